"""Six steps of the GPU's program, executed by the interpreter, against the CPU's float32 program.

Both start from the same state, and take the same batches. `bound` derives how far half precision may lead them apart,
and the last tests show that it is tight: they break the program, and the bound is exceeded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from gpu_program import array_operators as arrays
from gpu_program.build import IMAGES_PER_RANK, MODEL, GpuCase
from gpu_program.interpreter import Instruction
from gpu_program.operators import OPERATORS, Operator
from gpu_program.world import Instructions, World
from vit_static.checkpoint.sharded_state import ShardedReader
from vit_static.config.schema import AmpConfig, KernelsConfig, ParallelConfig
from vit_static.model.attention import attention_by_matmul
from vit_static.model.vit import VisionTransformer
from vit_static.optim.ema import EMA
from vit_static.optim.muon import NEWTON_SCHULZ
from vit_static.parallel.dist_values import local_array
from vit_static.parallel.mesh import MeshShape, start_mesh
from vit_static.program.ir import is_read_by_marked
from vit_static.program.precision import Precision
from vit_static.program.program import Program

pytestmark = pytest.mark.early  # the cases share the ranks and the references that `runs` keeps

NUM_STEPS = 6
FLOAT32_BOUND = 1e-5
UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
# A norm that every step exceeds. And AdamW's epsilon above most gradients: otherwise its direction for an element whose
# gradient is nearly 0, m / sqrt(v), is only the sign of a rounding error.
OPTIM = {"clip_norm": 0.3, "epsilon": 1e-3}


def gpu_case(mesh: str, precision: str, optimizer: str = "adamw", **others: object) -> GpuCase:
    return GpuCase(mesh, precision, optimizer, optim=OPTIM, **others)


def bound(case: GpuCase) -> float:
    """Return how far half precision may lead a gradient apart, relative to its norm.

    Each result that is stored in half precision has a relative error of at most u, the unit roundoff (2^-8 in bfloat16,
    2^-11 in float16). Products and sums accumulate in float32, and add nothing. To first order the errors along a path
    through the network add up, each passed on with a factor near 1: layers between normalizations are scaled to keep
    the norm, and residual connections pass errors on unchanged. Rounding errors are nearly independent with mean 0, so
    the sum of K of them grows as sqrt(K) u, not as K u (Higham and Mary, SIAM J. Sci. Comput. 41, 2019, A2815). Two of
    these standard deviations are the bound.

    K counts the results along the path of a gradient. A block stores 11: two normalizations, the projections of q, k
    and v, the weights of the attention, its result, its projection, fc1, GELU, fc2, and two residual sums. Before and
    after the blocks there are 9: the cast of the images, that of the kernel, its product, tokens and position
    embedding; the last normalization, head0, tanh and the head. The backward pass stores as many again.

    The same bound holds for the change of a weight, relative to its norm: of SGD it is proportional to the gradient,
    of AdamW, g / (|g| + epsilon), it changes by no more than g does, in relative terms. And it holds for the loss, in
    absolute terms: its gradient in the logits, whose size is near 1, has a 1-norm below 2, and it only sees the half of
    the roundings.
    """
    num_roundings = 2 * (11 * case.config().model.depth + 9)
    return 2.0 * math.sqrt(num_roundings) * UNIT_ROUNDOFF[case.precision.split()[1]]


@dataclass(frozen=True)
class Run:
    """The course of a run, and the state before and after it."""

    losses: np.ndarray
    grad_norms: np.ndarray  # before clipping
    start: dict[str, np.ndarray]  # the state before the first step, by canonical name
    state: dict[str, np.ndarray]  # after the last


def batch(step: int, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the images and labels of a step."""
    rng = np.random.default_rng(step)
    images = rng.standard_normal((num_images, 3, *MODEL.image_size)).astype(np.float32)
    return images, rng.integers(0, MODEL.num_classes, num_images)


def execute(world: World, first_step: int = 0, num_steps: int = NUM_STEPS) -> Run:
    """Train on the interpreter."""
    num_images = world.case.config().data.global_batch_size
    start = world.state()
    steps = range(first_step, first_step + num_steps)
    losses, norms = zip(*(world.train_step(*batch(step, num_images), step) for step in steps), strict=True)
    return Run(np.array(losses), np.array(norms), start, world.state())


class Reference:
    """The float32 program of one process on a CPU, with the optimizer, model and batches of a GPU's case."""

    def __init__(self, case: GpuCase) -> None:
        config = case.config()
        self._num_images = config.data.global_batch_size
        config = config.model_copy(
            update={"parallel": ParallelConfig(), "amp": AmpConfig(level="O0"), "kernels": KernelsConfig(onednn=False)}
        )
        self._scope = paddle.static.Scope()
        with self._entered():
            paddle.seed(config.seed)
            self.program = Program.for_training(
                config,
                VisionTransformer(config.model, attention_by_matmul),
                start_mesh(MeshShape(1, 1, 1), "cpu"),
                Precision("O0", "float32"),
                learning_rate=lambda step: 1e-3,
                eval_batch_size=IMAGES_PER_RANK * case.shape.dp,
            )
            self.program.compiled("train")

    def _entered(self) -> AbstractContextManager[None]:
        return paddle.static.scope_guard(self._scope)

    def restore(self, paths: list[Path]) -> None:
        with self._entered():
            self.program.restore(ShardedReader(paths))

    def train(self, first_step: int = 0, num_steps: int = NUM_STEPS) -> Run:
        losses, norms, start = [], [], self.state()
        with self._entered():
            for step in range(first_step, first_step + num_steps):
                images, labels = map(paddle.to_tensor, batch(step, self._num_images))
                loss = self.program.train_step(images, labels, step)
                losses.append(self.program.loss_value(loss))
                norms.append(self.program.grad_norm())
        return Run(np.array(losses), np.array(norms), start, self.state())

    def evaluate(self, images: np.ndarray, labels: np.ndarray, ema: bool) -> np.ndarray:
        with self._entered(), self.program.ema_weights() if ema else nullcontext():
            return np.array(self.program.eval_step(paddle.to_tensor(images), paddle.to_tensor(labels)))

    def state(self) -> dict[str, np.ndarray]:
        with self._entered():
            return {name: local_array(tensor).copy() for name, tensor in self.program.state().items()}


class Runs:
    """The ranks and the reference of each case, which start every test from the same state."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._worlds: dict[GpuCase, tuple[World, list[Path]]] = {}
        self._references: dict[tuple[object, ...], Reference] = {}

    def built(self, case: GpuCase) -> tuple[World, list[Path]]:
        """Return the ranks of a case, in whatever state they are, and the files of their initial state."""
        if case not in self._worlds:
            world = World(case, ("train", "eval") if case in EVALUATED else ("train",))
            folder = self._folder / str(len(self._worlds))
            folder.mkdir()
            self._worlds[case] = world, world.save(folder)
        return self._worlds[case]

    def world(self, case: GpuCase) -> World:
        """Return the ranks of a case, in their initial state."""
        world, paths = self.built(case)
        world.restore(paths)
        return world

    def reference(self, case: GpuCase) -> Reference:
        """Return the reference of a case, in the initial state of its ranks."""
        config = case.config()
        key = config.optim, config.model, config.data.global_batch_size, case.shape.dp
        reference = self._references.get(key) or self._references.setdefault(key, Reference(case))
        reference.restore(self.built(case)[1])
        return reference


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    yield Runs(tmp_path_factory.mktemp("states"))


def relative_errors(run: Run, reference: Run) -> dict[str, float]:
    """Return by name the error of each weight after the run, relative to how far the reference has moved it."""
    moved = {name: rms(reference.state[name] - reference.start[name]) for name in run.state if "@" not in name}
    # Attention doesn't change when a vector is added to all keys: the gradient of their bias is 0 but for rounding, and
    # its error is measured by that of the queries' bias.
    moved |= {name: moved[name.replace("attn.k", "attn.q")] for name in moved if name.endswith("attn.k.bias")}
    return {name: rms(run.state[name] - reference.state[name]) / scale for name, scale in moved.items()}


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def assert_within(limit: float, run: Run, reference: Run) -> None:
    """Compare losses, norms of the gradients, and weights."""
    np.testing.assert_allclose(run.losses, reference.losses, 0.0, limit)
    np.testing.assert_allclose(run.grad_norms, reference.grad_norms, limit)
    errors = relative_errors(run, reference)
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < limit, (worst, errors[worst])


NO_ZERO_GRADIENTS = MODEL.model_copy(update={"qkv_bias": False})  # see relative_errors
TWO_BLOCKS = MODEL.model_copy(update={"depth": 2})
SMALL_SCALE = {"init_loss_scaling": 256.0}  # at which no gradient overflows
# Lion isn't here: its update is a sign, and rounding decides those of some elements.
FLOAT32 = [
    gpu_case("single", "O0 float32", "sgd", recompute="block", dropout=0.1),
    gpu_case("dp 2 x mp 2", "O0 float32", has_ema=True),
    gpu_case("pp 2 x dp 2", "O0 float32", "sgd", has_ema=True),
    gpu_case("dp 2, ZeRO 1", "O0 float32", "lamb"),
    gpu_case("dp 2, ZeRO 2", "O0 float32", "adafactor", num_micro_batches=2, has_ema=True, model=NO_ZERO_GRADIENTS),
    gpu_case("dp 2, ZeRO 3", "O0 float32", "sgd", has_ema=True, model=TWO_BLOCKS),
]
EXCHANGED = gpu_case("dp 2", "O2 float16", amp=SMALL_SCALE, parallel={"bucket_mb": 0})  # one exchange per gradient
HALF = [
    EXCHANGED,
    gpu_case("single", "O1 bfloat16", has_ema=True),
    gpu_case("dp 2 x mp 2", "O2 bfloat16"),
    gpu_case("dp 2, ZeRO 3", "O2 bfloat16", num_micro_batches=2, recompute="block"),
    gpu_case("dp 2, ZeRO 2", "O2 float16", "sgd", amp=SMALL_SCALE),
    gpu_case("pp 2", "O2 float16", amp=SMALL_SCALE),
    gpu_case("dp 2, ZeRO 2", "O2 float16", "schedule_free_adamw", amp=SMALL_SCALE),
]
EVALUATED = [FLOAT32[2], HALF[1]]


@pytest.mark.parametrize("case", FLOAT32, ids=str)
def test_a_float32_program_equals_the_cpus(runs, case):
    run, reference = execute(runs.world(case)), runs.reference(case).train()
    np.testing.assert_allclose(run.losses, reference.losses, 0.0, FLOAT32_BOUND)
    np.testing.assert_allclose(run.grad_norms, reference.grad_norms, FLOAT32_BOUND)
    assert min(run.grad_norms) > OPTIM["clip_norm"]
    assert run.state.keys() == reference.state.keys()
    weights = [name for name in run.state if "@" not in name or name.endswith(f"@{EMA}")]
    differences = {name: float(np.abs(run.state[name] - reference.state[name]).max()) for name in weights}
    worst = max(differences, key=differences.__getitem__)
    assert differences[worst] < FLOAT32_BOUND, (worst, differences[worst])


@pytest.mark.parametrize("case", HALF, ids=str)
def test_a_half_precision_program_stays_near_the_cpus(runs, case):
    run, reference = execute(runs.world(case)), runs.reference(case).train()
    assert_within(bound(case), run, reference)
    assert min(run.grad_norms) > OPTIM["clip_norm"]


def test_muon_orthogonalizes_the_matrices_of_sharded_parameters_in_bfloat16(runs):
    """The updates' singular values. The change of a single weight depends on roundings, since small ones are raised."""
    case = gpu_case("dp 2, ZeRO 3", "O2 bfloat16", "muon")
    world = runs.world(case)
    execute(world, num_steps=2)  # at first, the head's weights and so all gradients of the blocks are 0
    run = execute(world, first_step=2, num_steps=1)
    for name in ("attn.q", "attn.proj", "mlp.fc1", "mlp.fc2"):
        old, new = (state[f"blocks.0.{name}.weight"].astype(np.float64) for state in (run.start, run.state))
        direction = ((old - new) / 1e-3 - 0.1 * old) / (0.2 * np.sqrt(max(old.shape)))
        assert 0.7 < np.linalg.norm(direction, 2) < 1.3, name
    operators = world.compiled().global_block().ops
    products = [op for op in operators if op.has_attr(NEWTON_SCHULZ) and op.name() == "pd_op.matmul"]
    gathers = [op for op in operators if op.name() == "pd_op.all_gather" and is_read_by_marked(op, NEWTON_SCHULZ)]
    num_matrices = 6 * case.config().model.depth + 2  # of the blocks, the patches and head0
    assert (len(products), len(gathers)) == (15 * num_matrices, num_matrices)
    assert {op.operand_source(0).dtype for op in (*products, *gathers)} == {paddle.bfloat16}


def test_a_step_whose_gradients_overflow_changes_only_the_loss_scale(runs):
    """At the scale of 65536 the first gradients overflow. After two steps in a row the scale is halved.

    And the numbers of bad steps, in a row and in all, change.
    """
    case = gpu_case("single", "O2 float16", model=TWO_BLOCKS)
    world = runs.world(case)
    run = execute(world, num_steps=1)
    num_skipped = 0
    while not np.isfinite(run.grad_norms[0]):
        num_skipped += 1
        changed = {name for name in run.state if np.any(run.state[name] != run.start[name])}
        counts = {"@num_bad_steps", "@num_skipped_steps"}
        assert changed == (counts if num_skipped % 2 else {*counts, "@loss_scaling"})
        assert run.state["@loss_scaling"] == 65536 / 2 ** (num_skipped // 2)
        run = execute(world, num_skipped, num_steps=1)
    assert 2 <= num_skipped <= 8
    assert (run.state["@num_good_steps"], run.state["@num_skipped_steps"]) == (1, num_skipped)
    # The step after them is the optimizer's first.
    reference = runs.reference(case).train(num_skipped, num_steps=1)
    assert_within(bound(case), run, reference)


@pytest.mark.parametrize("case", EVALUATED, ids=str)
def test_evaluation_values_and_of_their_average_equals_the_cpus(runs, case):
    world, reference = runs.world(case), runs.reference(case)
    images_and_labels = batch(99, IMAGES_PER_RANK * case.shape.dp)
    execute(world, num_steps=2)
    reference.train(num_steps=2)
    values = world.eval_step(*images_and_labels)
    with world.ema_weights():
        ema_values = world.eval_step(*images_and_labels)
    limit = max(bound(case), FLOAT32_BOUND)
    np.testing.assert_allclose(values, reference.evaluate(*images_and_labels, ema=False), 0.0, limit)
    np.testing.assert_allclose(ema_values, reference.evaluate(*images_and_labels, ema=True), 0.0, limit)
    assert np.any(values != ema_values)


@pytest.mark.parametrize(
    ("saved", "restored"), [(FLOAT32[5], FLOAT32[2]), (HALF[5], HALF[3])], ids=["float32", "float16 to bfloat16"]
)
def test_a_state_is_restored_on_another_mesh_and_in_another_precision(runs, tmp_path, saved, restored):
    first, second = runs.world(saved), runs.world(restored)
    before = execute(first, num_steps=3).state
    paths = first.save(tmp_path)
    second.restore(paths)
    after = second.state()
    for name in after:
        np.testing.assert_array_equal(after[name], before[name])
    reference = runs.reference(restored)
    reference.restore(paths)
    limit = bound(restored) if restored in HALF else FLOAT32_BOUND
    assert_within(limit, execute(second, 3, 3), reference.train(3, 3))


# Broken programs


def changed(
    instructions: Instructions,
    is_broken: Callable[[Instruction], bool],
    function: Callable[..., Any],
    only_first: bool = True,
) -> Instructions:
    """Return a program whose first such instruction, or every one, computes function(original, *inputs)."""
    broken = list(instructions)
    for index, one in enumerate(instructions):
        if is_broken(one):
            original = arrays.copy if one.operator is None else partial(one.operator.function, **one.attributes)
            in_place = {} if one.operator is None else one.operator.in_place
            operator = Operator(partial(function, original), in_place)
            broken[index] = replace(one, operator=operator, attributes={}, supplied=frozenset())
            if only_first:
                break
    return tuple(broken)


def skip_an_exchange(instructions: Instructions) -> Instructions:
    """One gradient isn't summed over the data-parallel ranks."""
    return changed(instructions, reduces_a_tensor, lambda original, x: x.copy())


def wait_for_no_exchange(instructions: Instructions) -> Instructions:
    """The readers of all reductions find what was in their memory before."""
    return changed(instructions, reduces_a_tensor, lambda original, x: x.copy(), only_first=False)


def reduces_a_tensor(instruction: Instruction) -> bool:
    return instruction.name.startswith("pd_op.all_reduce") and math.prod(instruction.types[0][0][1]) > 1


def unscale_a_gradient_twice(instructions: Instructions) -> Instructions:
    """One gradient is multiplied twice by the factor that clips and unscales it."""
    types = {index: one.types[number] for one in instructions for number, index in enumerate(one.results)}

    def is_unscaling(instruction: Instruction) -> bool:
        if instruction.name != "pd_op.multiply":
            return False
        (_, shape), (_, factor_shape) = instruction.types[0][0], types[instruction.inputs[1]][0]
        return math.prod(shape) > 1 and factor_shape == (1,)

    return changed(instructions, is_unscaling, lambda original, gradient, factor: gradient * factor * factor)


def keep_one_row_of_a_bias_gradient(instructions: Instructions) -> Instructions:
    """The gradient of a linear layer's bias isn't summed over images and tokens."""

    def without_sum(original: Any, *inputs: Any) -> tuple[Any, ...]:
        x_grad, y_grad, _ = original(*inputs)
        return x_grad, y_grad, inputs[-1].reshape(-1, inputs[-1].shape[-1])[0].copy()

    return changed(instructions, lambda one: one.name == "pd_op.fused_gemm_epilogue_grad", without_sum)


def update_rounded_weights(instructions: Instructions) -> Instructions:
    """AdamW starts from the weights in half precision, not from their master copies."""

    def without_master(original: Any, *inputs: Any) -> tuple[Any, ...]:
        return original(*inputs[:8], inputs[0], *inputs[9:])

    return changed(instructions, lambda one: one.name == "pd_op.adamw_", without_master, only_first=False)


@pytest.mark.parametrize(
    ("case", "break_program"),
    [
        (EXCHANGED, skip_an_exchange),
        (EXCHANGED, wait_for_no_exchange),
        (EXCHANGED, unscale_a_gradient_twice),
        (EXCHANGED, keep_one_row_of_a_bias_gradient),
        (HALF[2], update_rounded_weights),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_program_exceeds_the_bound(runs, case, break_program):
    """By far: after ten steps, with two blocks, by 15 times in bfloat16, and by 90 times or more in float16."""
    world = runs.world(case)
    with world.rewritten(break_program):
        run = execute(world, num_steps=4)
    errors = relative_errors(run, runs.reference(case).train(num_steps=4))
    assert max(errors.values()) > 5 * bound(case)


def test_every_operator_of_the_table_occurs_in_a_program(runs):
    """Nearly all in those above. (test_programs.py tests the reverse, with many more programs.)"""
    names = {name for case in [*FLOAT32, *HALF] for name in runs.built(case)[0].operator_names()}
    two_pools = MODEL.model_copy(update={"pool": "cls_gap"})
    names |= World(gpu_case("single", "O2 bfloat16", "lion", dropout=0.1, model=two_pools)).operator_names()
    names |= World(gpu_case("single", "O2 float16", "adafactor")).operator_names()  # whose own count of steps is used
    assert set(OPERATORS) - names == set()
