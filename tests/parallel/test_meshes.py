"""Training on every mesh, compared with one process: losses, weights, dropout masks, collectives.

The cases, and the processes that run them, are in helpers/mesh_cases.py.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict

import numpy as np
import pytest
from helpers.mesh_cases import (
    CASES,
    DISTILLED_ON,
    DROP_PATH,
    EVALUATED,
    EVALUATED_EMA,
    LORA,
    MESHES,
    MESHES_OF,
    MIXUP,
    MODELS,
    NUM_EVAL_IMAGES,
    OPTIMIZERS,
    RECIPES,
    RECIPES_TRAINED,
    SIZES,
    STEPS_WITH_A_REPETITION,
    TRAINED,
    Runs,
)
from helpers.mesh_worker import BATCH_SIZE, Outcome, Part
from helpers.small import MESH_MODEL

from vit_static.config.data_schema import DataConfig
from vit_static.config.schema import AmpConfig, Config
from vit_static.parallel.gloo import Traffic
from vit_static.parallel.sharding import tp_axis
from vit_static.plan.costs import count_by_kind
from vit_static.plan.planner import Cluster, make_plan

pytestmark = pytest.mark.early
NO_DIGEST = hashlib.sha256().hexdigest()  # of no arrays


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("meshes"))


def merged_state(outcomes: list[Outcome]) -> dict[str, np.ndarray]:
    """Merge the parts of all ranks. Ranks that hold the same part must hold the same bits."""
    arrays = {}
    for name in {name: None for outcome in outcomes for name in outcome.state}:
        held = [outcome.state[name] for outcome in outcomes if name in outcome.state]
        parts: dict[tuple[int, ...], Part] = {}
        for part in held:
            first = parts.setdefault(part.index, part)
            assert part.local.tobytes() == first.local.tobytes(), f"{name} {part.index}"
        array = concatenated({index: part.local for index, part in parts.items()}, held[0].num_parts)
        assert array.shape == held[0].shape, name
        arrays[name] = array
    return arrays


def concatenated(parts: dict[tuple[int, ...], np.ndarray], num_parts: tuple[int, ...]) -> np.ndarray:
    """Concatenate the parts of an array, given by their index along each axis."""
    assert set(parts) == set(itertools.product(*map(range, num_parts)))
    for axis in reversed(range(len(num_parts))):
        starts = sorted({index[:axis] for index in parts})
        parts = {at: np.concatenate([parts[at + (n,)] for n in range(num_parts[axis])], axis) for at in starts}  # noqa: RUF005 - mypy takes (*at, n) for Python 3.11's
    return parts[()]


# Losses and weights


@pytest.mark.parametrize(("name", "optimizer"), TRAINED)
def test_a_mesh_trains_like_one_process(runs: Runs, name: str, optimizer: str) -> None:
    """Six steps, with clipping and with weight decay or momentum."""
    one, outcomes = runs.one(f"one_{MESHES_OF[optimizer][name][1]}_{optimizer}"), runs(f"{name}_{optimizer}")
    for outcome in outcomes:
        np.testing.assert_allclose(outcome.losses, one.losses, rtol=1e-5)
        if not np.isnan(outcome.grad_norms).all():
            np.testing.assert_allclose(outcome.grad_norms, one.grad_norms, rtol=1e-5)
    assert not np.isnan(outcomes[0].grad_norms).any()
    weights, expected = merged_state(outcomes), merged_state([one])
    assert weights.keys() == expected.keys()
    assert all(weights[key].shape == expected[key].shape for key in weights)
    if optimizer == "sgd":
        assert min(one.grad_norms) > OPTIMIZERS["sgd"].clip_norm
        for key, value in expected.items():
            np.testing.assert_allclose(weights[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize(("name", "optimizer"), RECIPES_TRAINED)
def test_the_optimizers_of_recipes_update_like_in_one_process(runs: Runs, name: str, optimizer: str) -> None:
    """The weights, the optimizer state and the EMA agree.

    Values aren't compared for the bias of k, whose gradient consists of rounding errors, nor for Lion, which depends on
    signs.
    """
    one, outcomes = runs.one(f"recipe_one_{optimizer}"), runs(f"recipe_{name}_{optimizer}")
    for outcome in outcomes:
        np.testing.assert_allclose(outcome.losses, one.losses, rtol=1e-5)
    state, expected = merged_state(outcomes), merged_state([one])
    assert state.keys() == expected.keys()
    has_ema = RECIPES[optimizer].ema_decay > 0.0
    assert sum(key.endswith("@ema") for key in state) == (len(weight_names(state)) if has_ema else 0)
    if optimizer == "adafactor":
        assert expected["blocks.0.attn.q.weight@row_moment2"].shape == (32,)
    for key, value in expected.items():
        assert state[key].shape == value.shape, key
        if optimizer in ("adamw", "lamb", "schedule_free_adamw", "muon") and ".attn.k.bias" not in key:
            np.testing.assert_allclose(state[key], value, rtol=1e-3, atol=2e-5, err_msg=key)


@pytest.mark.parametrize("name", [name for name in SIZES if not name.endswith("one")])
def test_a_mesh_trains_on_several_image_sizes_like_one_process(runs: Runs, name: str) -> None:
    """The program is compiled twice, and the weights and the optimizer's state continue in the second one."""
    reference = "sizes_two_blocks_one" if name.startswith("sizes_two_blocks") else "sizes_one"
    one, outcomes = runs.one(reference), runs(name)
    for outcome in outcomes:
        np.testing.assert_allclose(outcome.losses, one.losses, rtol=1e-5)
    state, expected = merged_state(outcomes), merged_state([one])
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(state[key], value, rtol=1e-5, atol=2e-6, err_msg=key)


@pytest.mark.parametrize("name", EVALUATED_EMA)
def test_the_ema_is_evaluated_on_any_mesh(runs: Runs, name: str) -> None:
    """The worker checks that the weights are the same before and after."""
    one = runs.one("recipe_one_adamw")
    assert one.ema_evaluation.loss != one.evaluation.loss
    for outcome in runs(f"recipe_{name}_adamw"):
        assert outcome.ema_evaluation.loss == pytest.approx(one.ema_evaluation.loss, rel=1e-5)


def test_the_average_of_schedule_free_is_evaluated_with_sharded_state(runs: Runs) -> None:
    one = runs.one("recipe_one_schedule_free_adamw")
    for outcome in runs("recipe_dp2_sharding2_schedule_free_adamw"):
        assert outcome.evaluation.loss == pytest.approx(one.evaluation.loss, rel=1e-5)


@pytest.mark.parametrize(("kind", "name"), DISTILLED_ON)
def test_a_student_learns_from_its_teacher_as_in_one_process(runs: Runs, kind: str, name: str) -> None:
    """With mixed images. The weights, a projector's included, agree; the teacher's don't change."""
    one, outcomes = runs.one(f"{kind}_one"), runs(f"{kind}_{name}")
    for outcome in outcomes:
        np.testing.assert_allclose(outcome.losses, one.losses, rtol=1e-5)
        for parts, expected_parts in zip(outcome.loss_parts, one.loss_parts, strict=True):
            assert parts == pytest.approx(expected_parts, rel=1e-5) and parts["distill_loss"] > 0.01
        assert len(set(outcome.teacher_digests)) == 1 and outcome.teacher_digests[0] != NO_DIGEST
    weights, expected = merged_state(outcomes), merged_state([one])
    assert weights.keys() == expected.keys() and not any("teacher" in key for key in weights)
    assert ("distill_projector.weight" in weights) == (kind == "features")
    for key, value in expected.items():
        np.testing.assert_allclose(weights[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


def weight_names(state: dict[str, np.ndarray]) -> list[str]:
    return [key for key in state if "@" not in key]


@pytest.mark.parametrize("name", MIXUP)
def test_mixup_is_that_of_one_process(runs: Runs, name: str) -> None:
    """And so is a binary cross-entropy with a focal factor and weights of classes and positives."""
    one, outcomes = runs.one("mixed_one"), runs(name)
    for outcome in outcomes:
        np.testing.assert_allclose(outcome.losses, one.losses, rtol=1e-5)
    assert np.abs(np.subtract(one.losses, runs.one("one_gap_sgd").losses)).max() > 1e-2
    merged_state(outcomes)


@pytest.mark.parametrize("name", LORA)
def test_adapters_train_as_in_one_process(runs: Runs, name: str) -> None:
    """And only they and the head have a state of the optimizer."""
    one, outcomes = runs.one("lora_one"), runs(name)
    for outcome in outcomes:
        np.testing.assert_allclose(outcome.losses, one.losses, rtol=1e-5)
    np.testing.assert_allclose(outcomes[0].grad_norms, one.grad_norms, rtol=1e-5)
    assert min(one.grad_norms) > OPTIMIZERS["sgd"].clip_norm
    state, expected = merged_state(outcomes), merged_state([one])
    assert state.keys() == expected.keys()
    trained = {key.split("@")[0] for key in state if "@" in key}
    assert trained == {key for key in weight_names(state) if key.startswith("head.") or ".lora_" in key}
    assert len(trained) == 2 + 2 * 7 * 3  # the head; q, k, v, proj, fc1, gate, fc2 of two blocks and the pooling
    for key, value in expected.items():
        np.testing.assert_allclose(state[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize(("name", "optimizer"), [pair for pair in TRAINED if "sharding" in pair[0]])
def test_zero_splits_every_tensor_that_can_be_split(runs: Runs, name: str, optimizer: str) -> None:
    """Moments, and in stage 3 parameters, are split over dp along the first axis that can be divided, and that tensor
    parallelism doesn't split."""
    parallel = MESHES_OF[optimizer][name][0]
    stage = parallel.sharding_stage
    for outcome in runs(f"{name}_{optimizer}"):
        moments = {key: part for key, part in outcome.state.items() if key.endswith(("moment1", "moment2", "velocity"))}
        for key, moment in moments.items():
            parameter = outcome.state[key.split("@")[0]]
            mp_axis = tp_axis(key.split("@")[0], list(parameter.shape), parallel.mp)
            mp_parts = tuple(parallel.mp if axis == mp_axis else 1 for axis in range(len(parameter.shape)))
            divisible = [n for n, size in enumerate(parameter.shape) if mp_parts[n] == 1 and size % 2 == 0]
            expected = [2 if n in divisible[:1] else parts for n, parts in enumerate(mp_parts)]
            assert list(moment.num_parts) == expected, key
            assert [n * parts for n, parts in zip(moment.local.shape, expected, strict=True)] == list(moment.shape), key
            assert parameter.num_parts == (mp_parts if stage < 3 else moment.num_parts), key
        assert sum(2 in part.num_parts for part in moments.values()) > 0.9 * len(moments)
        assert all(part.num_parts == (1,) for key, part in moments.items() if part.shape == (7,))  # the head's bias


@pytest.mark.parametrize("name", EVALUATED)
def test_every_image_is_evaluated_once_on_any_mesh(runs: Runs, name: str) -> None:
    """101 images in batches of 8, of which the last is padded. Every rank has all predictions."""
    reference = runs.one(f"one_{MESHES[name][1]}_sgd")
    one, predictions = reference.evaluation, reference.predictions
    assert one.num_images == NUM_EVAL_IMAGES
    for outcome in runs(f"{name}_sgd"):
        evaluation = outcome.evaluation
        assert (evaluation.num_images, evaluation.top1, evaluation.top5) == (one.num_images, one.top1, one.top5)
        assert evaluation.loss == pytest.approx(one.loss, rel=1e-5)
        np.testing.assert_array_equal(outcome.predictions.classes, predictions.classes)
        np.testing.assert_array_equal(outcome.predictions.labels, predictions.labels)
        np.testing.assert_allclose(outcome.predictions.probabilities, predictions.probabilities, rtol=1e-4)


# Dropout masks


@pytest.mark.parametrize("name", DROP_PATH)
def test_drop_path_is_that_of_one_process(runs: Runs, name: str) -> None:
    one = runs.one(DROP_PATH[name][1])
    for outcome in runs(name):
        np.testing.assert_allclose(outcome.losses, one.losses, rtol=1e-5)
    merged_state(runs(name))


def test_drop_path_changes_the_losses(runs: Runs) -> None:
    one_batch, micro_batches = runs.one("paths_one").losses, runs.one("paths_accum2").losses
    assert one_batch[0] == pytest.approx(micro_batches[0])  # the head's initial weights are zero
    assert np.abs(np.subtract(one_batch, micro_batches))[1:].max() > 2e-4  # the tolerance above is 2e-5


RECOMPUTED = {
    "dropout_recompute": ("dropout_one", [0, 1, 2]),
    "dropout_recompute_accum2": ("dropout_accum2", [0, 2]),
    "dropout_pp2_recompute": ("dropout_pp2", [0, 1, 2]),
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputed_blocks_draw_their_masks_again(runs: Runs, name: str) -> None:
    """Losses and weights are the same as without recomputing, to the last bit."""
    without, blocks = RECOMPUTED[name]
    drawn_again = set()
    for outcome, reference in zip(runs(name), runs(without), strict=True):
        assert outcome.losses == reference.losses
        assert all(part.local.tobytes() == reference.state[key].local.tobytes() for key, part in outcome.state.items())
        for masks, masks_without in zip(outcome.masks, reference.masks, strict=True):
            for dropout, drawn in masks_without.items():
                again = masks[dropout]
                assert {mask.tobytes() for mask in again} == {mask.tobytes() for mask in drawn}
                if len(again) > len(drawn):
                    assert len(again) == 2 * len(drawn)
                    drawn_again.add(dropout)
    # Dropout 0 is that of the position embedding; each block has six.
    assert sorted({(dropout - 1) // 6 for dropout in drawn_again}) == blocks
    assert len(drawn_again) == sum(6 if block > 0 else 4 for block in blocks)  # the first block never drops its paths


def test_a_pipeline_draws_the_masks_of_its_micro_batches(runs: Runs) -> None:
    one = runs.one("dropout_accum2")
    for outcome in runs("dropout_pp2"):
        np.testing.assert_allclose(outcome.losses, one.losses, rtol=1e-5)
        for masks, masks_of_one in zip(outcome.masks, one.masks, strict=True):
            assert all(np.array_equal(drawn, masks_of_one[dropout]) for dropout, drawn in masks.items())


@pytest.mark.parametrize("name", ["dropout_one", "dropout_accum2", "dropout_pp2"])
def test_steps_micro_batches_and_layers_draw_different_masks(runs: Runs, name: str) -> None:
    """A repeated step draws the same masks again."""
    outcomes = runs(name)
    first, second, third, second_again = (
        [mask for outcome in outcomes for drawn in outcome.masks[n].values() for mask in drawn if is_large(mask)]
        for n in range(len(STEPS_WITH_A_REPETITION))
    )
    num_dropouts = 1 + 4 * MESH_MODEL.depth
    assert len(first) == num_dropouts * (1 if name == "dropout_one" else 2)
    drawn = [mask.tobytes() for mask in (*first, *second, *third)]
    assert len(set(drawn)) == len(drawn)
    assert [mask.tobytes() for mask in second_again] == [mask.tobytes() for mask in second]


def test_ranks_with_the_same_activations_draw_the_same_masks(runs: Runs) -> None:
    """Ranks with different activations draw different masks."""
    outcomes, parallel = runs("dropout_dp2_mp2"), CASES["dropout_dp2_mp2"].parallel
    merged_state(outcomes)
    for step, dropout in itertools.product(range(len(STEPS_WITH_A_REPETITION)), outcomes[0].masks[0]):
        masks = [outcome.masks[step][dropout] for outcome in outcomes]
        assert all(len(drawn) == 1 for drawn in masks)
        for rank, other in itertools.combinations(range(len(outcomes)), 2):
            (mask,), (other_mask,) = masks[rank], masks[other]
            is_split = holds_split_activations(mask, parallel.mp)
            same_images = rank // parallel.mp == other // parallel.mp or not is_large(mask)
            same_channels = rank % parallel.mp == other % parallel.mp or not is_split
            assert np.array_equal(mask, other_mask) == (same_images and same_channels), (dropout, mask.shape)


def is_large(mask: np.ndarray) -> bool:
    """Return False for drop path, which draws one number per image, on every rank for the global batch."""
    return mask[0].size > 1


def holds_split_activations(mask: np.ndarray, mp: int) -> bool:
    """Return whether tensor parallelism splits the activations: attention weights by heads, the MLP's hidden layer."""
    heads, hidden = MESH_MODEL.num_heads // mp, MESH_MODEL.mlp_dim // mp
    num_tokens = (13, 1)  # of the blocks, and of the last one, which computes the class token alone
    split = [shape for count in num_tokens for shape in ((heads, count, 13), (count, hidden))]
    assert mask.shape[1:] in [*split, *((count, MESH_MODEL.width) for count in num_tokens), (1, 1)]
    return mp > 1 and mask.shape[1:] in split


# Collectives


@pytest.mark.parametrize("name", ["mp2", "mp2_replicated_head", "dp2_mp2", "mp2_pp2"])
def test_tensor_parallelism_needs_four_all_reduces_per_block(runs: Runs, name: str) -> None:
    """Two forward and two backward, as in Megatron-LM (arXiv 1909.08053, figure 4), and those of the logits.

    A last block that computes only the class token has those of one token, but for its keys' and values' gradient.
    """
    parallel, model = MESHES[name][0], MODELS[MESHES[name][1]]
    tokens = 12 + (model.pool == "cls")
    batch = BATCH_SIZE // parallel.dp // parallel.pp  # a micro-batch
    for rank, outcome in enumerate(runs(f"{name}_sgd")):
        stage = rank // (parallel.dp * parallel.mp)
        is_last = stage == parallel.pp - 1
        num_blocks = model.depth if parallel.pp == 1 else [2, 1][stage]
        first = rank // 2 * 2
        between = [one for one in outcome.collectives if one.ranks == (first, first + 1)]
        collectives = [(one.kind, one.role, one.num_bytes) for one in between if one.role != "update"]
        activations = 4 * batch * tokens * model.width
        expected = 2 * num_blocks * [("all_reduce", role, activations) for role in ("forward", "backward")]
        if is_last and model.pool == "cls":
            of_token = activations // tokens
            expected = expected[4:] + 2 * [("all_reduce", role, of_token) for role in ("forward", "backward")]
            expected.append(("all_reduce", "backward", activations))
        if is_last and model.num_classes % 2 == 0:
            head_inputs = 4 * batch * (model.representation_size or model.width)
            expected.append(("all_gather", "forward", 4 * batch * model.num_classes // 2))
            expected.append(("all_reduce", "backward", head_inputs))
        assert sorted(collectives) == sorted(expected), rank
        # The gradient norms: one number per block, and a few for the layers outside.
        update = [one.num_bytes for one in between if one.role == "update"]
        assert all(num_bytes <= 4 * (model.depth + 6) for num_bytes in update)


# The plan


PLANNED = [
    *("dp2_sgd", "dp2_mp2_sgd", "dp2_mp2_sharding1_sgd", "dp2_accum2_sharding2_sgd", "pp2_1F1B_accum4_sgd"),
    *("one_cls_adamw", "recompute_adamw", "dp2_sharding1_adamw", "dp2_sharding3_adamw", "pp2_1F1B_adamw"),
    "recipe_dp2_mp2_sharding1_muon",
]


@pytest.mark.parametrize("name", PLANNED)
def test_the_plan_predicts_the_run(runs: Runs, name: str) -> None:
    """For the first and the last rank: the bytes held between steps, the calls and bytes of a step's collectives."""
    case = CASES[name]
    config = Config(
        name=name,
        model=case.model,
        optim=case.optim,
        data=DataConfig(global_batch_size=BATCH_SIZE),
        amp=AmpConfig(level="O0"),
    )
    outcomes = runs(name)
    for rank, outcome in {rank: outcomes[rank] for rank in (0, case.world_size - 1)}.items():
        plan = make_plan(config, case.parallel, case.world_size, Cluster("a100-80g", "ib-hdr"), rank)
        held = {key: part.local.nbytes for key, part in outcome.state.items()}
        assert plan.costs.parameters == sum(size for key, size in held.items() if "@" not in key)
        assert plan.costs.optimizer_state == sum(size for key, size in held.items() if "@" in key)
        table = count_by_kind(plan.costs.collectives, plan.num_micro_batches)
        predicted: defaultdict[str, Traffic] = defaultdict(Traffic)
        for (kind, _, _), (num_calls, num_bytes) in table.items():
            predicted[kind].num_calls += num_calls
            predicted[kind].num_bytes += num_bytes
        assert outcome.traffic == predicted
