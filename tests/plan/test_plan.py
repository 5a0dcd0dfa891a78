"""Plans: their numbers against closed forms, and against a real run of the same program."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.small import ROOT, images_and_labels
from paddle.base import core

from vit_static.__main__ import main
from vit_static.common.errors import ConfigError
from vit_static.config.loader import load_config
from vit_static.config.schema import AmpConfig, Config, KernelsConfig, ParallelConfig
from vit_static.model import flops
from vit_static.model.draws import at_size
from vit_static.model.lora import add_adapters
from vit_static.model.variants import shape_of, variant_of
from vit_static.model.vit import VisionTransformer
from vit_static.parallel.mesh import Mesh, MeshShape, all_mesh_shapes, why_invalid
from vit_static.plan.costs import Collective, Costs, Operator, program_costs, runs_per_step
from vit_static.plan.planner import Cluster, Plan, make_plan, resolve_world_size, search_meshes, with_mesh
from vit_static.plan.run_length import run_length
from vit_static.plan.tables import plan_run
from vit_static.program.precision import Precision
from vit_static.program.program import Program

CONFIGS = ROOT / "configs"
A100 = Cluster("a100-80g", "ib-hdr")
TWO_BLOCKS = "model.depth=2"


def small_config(*overrides: str) -> Config:
    """Return the quickstart's config in float32 with one block, which compiles in a third of the time."""
    return load_config(CONFIGS / "quickstart.yaml", ["amp.level=O0", "model.depth=1", *overrides])


def planned(config: Config, mesh_text: str = "dp=1", rank: int = 0) -> Plan:
    parallel = with_mesh(config.parallel, mesh_text)
    return make_plan(config, parallel, resolve_world_size(parallel, None), A100, rank)


@pytest.fixture(scope="module")
def one_rank() -> Plan:
    return planned(small_config())


def num_parameters(config: Config) -> int:
    return sum(math.prod(parameter.shape) for parameter in VisionTransformer(config.model).parameters())


def test_operations_of_one_rank_are_the_closed_forms(one_rank: Plan) -> None:
    """Without the gradient of the images, which isn't computed: as many as the patch embedding's forward."""
    config = small_config()
    shape, batch = shape_of(config.model), config.data.global_batch_size
    image_gradient_flops = 2 * batch * shape.num_patches * shape.patch_dim * shape.width
    assert one_rank.costs.flops(1) == batch * flops.train_flops(shape) - image_gradient_flops


@pytest.mark.parametrize(
    "overrides",
    [
        ("lora.targets=[q,v]", "model.depth=2"),
        ("lora.targets=[mlp]", "model.mlp=swiglu"),
        ("lora.targets=[v]", "model.representation_size=24"),
        ("lora.targets=[k,proj]", "model.pool=map"),
        ("model.depth=2", "model.pool=map", "model.mlp=swiglu"),
    ],
    ids=str,
)
def test_operations_and_memory_with_lora_are_the_closed_forms(overrides: tuple[str, ...]) -> None:
    """The program computes no gradient of a frozen weight, and stores no gradient, moment or master copy of one."""
    config = small_config("init.from=weights", "lora.rank=3", *overrides)
    plan = planned(config)
    batch = config.data.global_batch_size
    assert plan.costs.flops(1) == batch * flops.train_flops(shape_of(config.model), config.lora)
    assert plan.model_flops == plan.costs.flops(1) < batch * flops.train_flops(shape_of(config.model))
    model = VisionTransformer(config.model)
    add_adapters(model, config.lora)
    trained = [math.prod(value.shape) for value in model.parameters() if not value.stop_gradient]
    assert plan.costs.parameters == 4 * sum(math.prod(value.shape) for value in model.parameters())
    assert plan.costs.gradients == 4 * sum(trained)
    assert plan.costs.optimizer_state == 8 * sum(trained) + 8 * len(trained)
    assert planned(config.model_copy(update={"amp": AmpConfig(level="O2")})).costs.optimizer_state == (
        12 * sum(trained) + 8 * len(trained)
    )


def test_memory_of_one_rank_is_the_closed_form(one_rank: Plan) -> None:
    """AdamW stores two moments of every parameter and two powers of beta per tensor."""
    config = small_config()
    count = num_parameters(config)
    tensors = len(VisionTransformer(config.model).parameters())
    assert one_rank.costs.parameters == one_rank.costs.gradients == 4 * count
    assert one_rank.costs.optimizer_state == 8 * count + 8 * tensors
    assert one_rank.costs.collectives == ()


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("recompute=block", "grad_accum_steps=2")], ids=str)
def test_a_step_allocates_the_planned_memory(cpu_mesh: Mesh, overrides: tuple[str, ...]) -> None:
    """Within 15 % of the peak that Paddle reports, for a model with some 50 MB of activations."""
    model = ["model.variant=S/16", "model.image_size=96", "model.depth=2", "data.global_batch_size=16"]
    quickstart_sizes = [f"model.{key}=null" for key in ("patch_size", "width", "num_heads", "mlp_dim")]
    config = small_config(*quickstart_sizes, *model, *(f"parallel.{override}" for override in overrides))
    program = Program.for_training(
        # A plan is for GPUs: it doesn't contain what the CPU kernels save.
        config.model_copy(update={"kernels": KernelsConfig(onednn=False)}),
        VisionTransformer(config.model),
        cpu_mesh,
        Precision("O0", "float32"),
        learning_rate=lambda step: 1e-3,
        eval_batch_size=16,
        count_costs=program_costs,
    )
    batch = images_and_labels(16, config.model)
    num_input_bytes = sum(tensor.numpy().nbytes for tensor in batch)
    measured = []
    for step in range(7):
        before = core.host_memory_stat_current_value("Allocated", 0)  # with the batch
        core.host_memory_stat_reset_peak_value("Allocated", 0)
        program.loss_value(program.train_step(*batch, step))
        measured.append(core.host_memory_stat_peak_value("Allocated", 0) - before + num_input_bytes)
    # The first two steps also allocate persistent memory, such as accumulated gradients. In any other, a thread that
    # waits for a core may free tensors late: those of this step, or of the one before.
    peak = np.median(measured[2:])
    costs = program.costs()
    persistent = costs.gradients if config.parallel.grad_accum_steps > 1 else 0
    assert costs.step_peak - persistent == pytest.approx(peak, rel=0.15), measured
    # The plan, which is compiled without a run, has the same costs.
    assert planned(config).costs.step_peak == costs.step_peak


def test_half_precision_stores_two_bytes_and_a_master_copy(one_rank: Plan) -> None:
    half = planned(small_config("amp.level=O2"))
    count = num_parameters(small_config())
    assert half.costs.parameters == 2 * count and half.costs.gradients == 4 * count
    assert half.costs.optimizer_state == one_rank.costs.optimizer_state + 4 * count
    # Half the bytes, and none for the attention scores [B, heads, N, N], which a fused kernel never stores.
    assert half.costs.activations < 0.5 * one_rank.costs.activations
    assert planned(small_config("amp.level=O2", "amp.master_grad=false")).costs.gradients == 2 * count


def test_data_parallel_ranks_sum_every_gradient_once(one_rank: Plan) -> None:
    costs = planned(small_config(), "dp=4").costs
    reduced = [one for one in costs.collectives if one.role != "forward" and one.kind == "all_reduce"]
    assert sum(one.num_bytes for one in reduced) == costs.parameters
    assert {one.ranks for one in reduced} == {(0, 1, 2, 3)}
    assert costs.activations == pytest.approx(one_rank.costs.activations / 4, rel=0.1)


def test_buckets_reduce_several_gradients_at_a_time() -> None:
    counts = {
        bucket_mb: len(planned(small_config(TWO_BLOCKS, f"parallel.bucket_mb={bucket_mb}"), "dp=2").costs.collectives)
        for bucket_mb in (0, 1, 64)
    }
    tensors = len(VisionTransformer(small_config(TWO_BLOCKS).model).parameters())
    assert counts[0] >= tensors > counts[1] > counts[64]
    assert counts[64] <= 5


def test_gradients_scattered_during_the_backward_are_stored_sharded() -> None:
    """ZeRO's second stage: with exchanges after the backward each rank holds all of them at its end."""
    stored = {}
    for overlap in (True, False):
        config = small_config("parallel.bucket_mb=0.2", f"parallel.overlap_gradients={str(overlap).lower()}")
        for mesh_text in ("dp=4", "dp=4,sharding=2"):
            stored[mesh_text, overlap] = planned(config, mesh_text).costs.gradients
    total = 4 * num_parameters(small_config())
    assert stored["dp=4", True] == stored["dp=4", False] == stored["dp=4,sharding=2", False] == total
    # The last bucket isn't scattered yet when the backward ends, and bias gradients are small.
    assert total / 4 <= stored["dp=4,sharding=2", True] < total / 4 + 0.4e6


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sharding_splits_the_state(one_rank: Plan, stage: int) -> None:
    costs = planned(small_config(), f"dp=2,sharding={stage}").costs
    # Except for tensors that 2 doesn't divide, and the powers of beta.
    assert costs.optimizer_state == pytest.approx(one_rank.costs.optimizer_state / 2, rel=0.02)
    assert costs.parameters == pytest.approx(one_rank.costs.parameters / (2 if stage == 3 else 1), rel=0.02)
    kinds = {(one.kind, one.role) for one in costs.collectives}
    assert (("reduce_scatter", "update") in kinds or ("reduce_scatter", "backward") in kinds) == (stage > 1)
    assert (("all_gather", "update") in kinds) == (stage < 3)


def test_third_stage_keeps_no_gathered_parameters_between_forward_and_backward() -> None:
    """It gathers them again in the backward pass, as many bytes as in the forward pass."""
    second, third = (planned(small_config("parallel.recompute=block"), f"dp=2,sharding={n}").costs for n in (2, 3))
    assert third.kept_activations <= second.kept_activations
    gathered = {
        role: sum(one.num_bytes for one in third.collectives if (one.kind, one.role) == ("all_gather", role))
        for role in ("forward", "backward")
    }
    assert gathered["forward"] == pytest.approx(third.parameters, rel=0.05)
    assert gathered["backward"] == pytest.approx(gathered["forward"], rel=0.05)


def test_recomputation_saves_memory_and_costs_operations() -> None:
    config = small_config("model.depth=3")
    plain, recomputed = planned(config), planned(config, "recompute=block")
    assert recomputed.costs.activations < 0.5 * plain.costs.activations
    forward = flops.forward_macs(shape_of(config.model)) * 2 * 64
    added = recomputed.costs.flops(1) - plain.costs.flops(1)
    assert 0.9 * forward < added < forward  # all blocks, but not the patch embedding and the head
    assert recomputed.model_flops == plain.model_flops


def test_tensor_parallelism_reduces_activations_twice_per_block_and_direction() -> None:
    config = small_config()
    collectives = planned(config, "mp=2").costs.collectives
    shape = shape_of(config.model)
    size = 4 * config.data.global_batch_size * shape.num_tokens * shape.width
    for role in ("forward", "backward"):
        reduced = [one for one in collectives if (one.kind, one.role) == ("all_reduce", role)]
        assert sum(one.num_bytes == size for one in reduced) == 2 * shape.depth
    gathered = [one for one in collectives if one.kind == "all_gather"]
    assert [one.num_bytes for one in gathered] == [4 * config.data.global_batch_size * config.model.num_classes // 2]


def test_a_pipelines_first_stage_holds_more_micro_batches() -> None:
    config = small_config(TWO_BLOCKS)
    first, last = (planned(config, "pp=2,accum=4", rank) for rank in (0, 1))
    assert (first.num_in_flight, last.num_in_flight) == (2, 1)
    assert first.activations == first.costs.activations + first.costs.kept_activations
    fthenb = planned(small_config(TWO_BLOCKS, "parallel.pp_schedule=FThenB"), "pp=2,accum=4")
    assert fthenb.num_in_flight == 4
    sent = [one for one in first.costs.collectives if (one.kind, one.role) == ("send", "forward")]
    shape = shape_of(config.model)
    assert [one.num_bytes for one in sent] == [4 * 16 * shape.num_tokens * shape.width]


@pytest.mark.parametrize("mesh_text", ["dp=2,mp=2", "pp=2"])
def test_a_teacher_costs_a_forward_pass(mesh_text: str) -> None:
    """Its parameters, split as the model's are, and its operations; no state, no gradients, no exchange of them."""
    config = small_config(TWO_BLOCKS, "model.width=64")
    distilled = small_config(
        *(TWO_BLOCKS, "model.width=64", "distill.teacher=nowhere", f"distill.config={CONFIGS / 'quickstart.yaml'}")
    )
    teacher = load_config(CONFIGS / "quickstart.yaml")
    costs, with_teacher = planned(config, mesh_text).costs, planned(distilled, mesh_text).costs
    for name in ("parameters", "gradients", "optimizer_state"):
        assert getattr(with_teacher, name) == getattr(costs, name)
    of_teacher = planned(teacher.model_copy(update={"amp": config.amp}), mesh_text).costs
    assert with_teacher.teacher == of_teacher.parameters
    expected = sum(op.num_flops for op in of_teacher.operators if op.role == "forward")
    assert with_teacher.flops(1) - costs.flops(1) == expected > 0
    assert with_teacher.memory(1) - costs.memory(1) == pytest.approx(of_teacher.parameters, rel=0.05)

    def in_role(all_costs: Costs, *roles: str) -> list[Collective]:
        return sorted((one for one in all_costs.collectives if one.role in roles), key=repr)

    assert in_role(with_teacher, "backward", "update") == in_role(costs, "backward", "update")
    both = [*in_role(costs, "forward"), *in_role(of_teacher, "forward")]
    assert in_role(with_teacher, "forward") == sorted(both, key=repr)


def test_times_follow_the_roofline_model() -> None:
    """By hand, for a made-up program on eight A100s of a node: 312 TFLOP/s, 2039 GB/s, links of 300 GB/s per way."""
    plan = Plan(
        mesh_shape=MeshShape(8, 1, 1),
        sharding_stage=0,
        recompute="none",
        num_micro_batches=2,
        rank=0,
        costs=Costs(
            parameters=int(20e9),
            gradients=int(20e9),
            optimizer_state=int(30e9),
            activations=int(7e9),
            kept_activations=int(6e9),
            step_peak=int(27e9),
            collectives=(Collective("all_reduce", "update", tuple(range(8)), 8 * 10**9),),
            operators=(Operator("forward", 10**6, 312 * 10**9), Operator("update", 2039 * 10**6, 0)),
        ),
        num_in_flight=1,
        cluster=A100,
        dtype="bfloat16",
        global_batch_size=1000,
        model_flops=8 * 312 * 10**9,
    )
    assert plan.compute_seconds == pytest.approx(2 * 1e-3 + 1e-3)
    assert plan.communication_seconds == pytest.approx(2 * 7 / 8 * 8e9 / 300e9)
    assert plan.step_seconds == plan.communication_seconds  # computation overlaps with it
    assert plan.images_per_s == pytest.approx(1000 / plan.step_seconds)
    assert plan.mfu == pytest.approx(1e-3 / plan.step_seconds)
    assert plan.memory == 77e9 and plan.fits
    assert not replace(plan, num_in_flight=2).fits
    two_nodes = replace(plan, cluster=replace(A100, gpus_per_node=4))
    assert two_nodes.communication_seconds == pytest.approx(
        2 * 7 / 8 * 8e9 / 100e9
    )  # four adapters of 25 GB/s per node


def test_bytes_on_the_wire_are_those_of_a_ring() -> None:
    assert Collective("all_reduce", "update", (0, 1, 2, 3), 1000).bytes_on_the_wire() == 1500
    assert Collective("all_gather", "update", (0, 1, 2, 3), 1000).bytes_on_the_wire() == 3000
    assert Collective("reduce_scatter", "update", (0, 1, 2, 3), 1000).bytes_on_the_wire() == 750
    assert Collective("send", "forward", (0, 1), 1000).bytes_on_the_wire() == 1000


def test_search_ranks_every_valid_mesh() -> None:
    """With one head, tensor parallelism is invalid. Of the two stages of a pipeline, the plan is that of the slower."""
    config = small_config(TWO_BLOCKS, "model.num_heads=1")
    plans = [run.largest for run in search_meshes(config, config.parallel, 2, A100)]
    variant = variant_of(config.model)
    valid = {
        mesh_shape
        for mesh_shape in all_mesh_shapes(2)
        if why_invalid(ParallelConfig(pp=mesh_shape.pp), mesh_shape, 2, config.data.global_batch_size, variant) is None
    }
    assert {plan.mesh_shape for plan in plans} == valid == {MeshShape(2, 1, 1), MeshShape(1, 1, 2)}
    assert sorted(plan.sharding_stage for plan in plans if plan.mesh_shape.dp == 2) == [0, 2, 3]
    assert [plan.step_seconds for plan in plans] == sorted(plan.step_seconds for plan in plans)


@pytest.mark.parametrize(
    ("overrides", "num_images", "steps", "text"),
    [
        ([], None, 300 * 1_281_167 // 1024, "at least 104 h 15 min and 834 GPU-hours for 375,341 steps, 300 epochs of"),
        (["train.epochs=1"], 102_400, 100, "at least 1 min 40 s and 0.22 GPU-hours for 100 steps, 1 epoch of 102,400"),
        (["train.max_steps=36000"], None, 36_000, "80 GPU-hours for 36,000 steps, 28.8 epochs of 1,281,167 images (Im"),
        (["model.num_classes=7", "train.max_steps=3600"], None, 3600, "8.00 GPU-hours for 3,600 steps; evaluations"),
        (["model.num_classes=7"], None, None, "depends on the number of training images: set it with --num-images N"),
    ],
)
def test_the_whole_run_has_hours_and_gpu_hours(
    overrides: list[str], num_images: int | None, steps: int | None, text: str
) -> None:
    """Of a step of one second on eight GPUs."""
    config = load_config(None, ["data.root=nowhere", *overrides])
    length = run_length(config, num_images)
    assert length.num_steps == steps and text in length.describe(config, 1.0, 8)


def test_the_verb_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config()
    out = tmp_path / "plan.json"
    plan_run(config, "dp=2,mp=2,sharding=1", None, A100, 0, False, out)
    output = capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["mesh"] == {"dp": 2, "mp": 2, "pp": 1} and written["world_size"] == 4 and written["fits"]
    assert written["bytes"]["parameters"] == planned(config, "dp=2,mp=2,sharding=1").costs.parameters
    assert {one["kind"] for one in written["collectives"]} == {"all_reduce", "all_gather"}
    run = written["run"]
    assert run["steps"] == 24 * 1442 // 64 and run["train_images"] == 1442
    assert run["gpu_hours_at_least"] == pytest.approx(run["steps"] * written["seconds"]["step_at_best"] * 4 / 3600)
    assert "whole run            at least 0 s and <0.01 GPU-hours for 540 steps, 24 epochs of 1,442 images" in output
    for word in ("parameters", "optimizer state", "activations, peak", "fits", "0,2", "images/s", "MFU"):
        assert word in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mesh", "mp=3"], ["parallel.mp = 3", "num_heads of 4", "1, 2 or 4"]),
        (["--mesh", "dp=3"], ["global_batch_size = 64", "63"]),
        (["--world", "8", "--mesh", "mp=8"], ["parallel.mp = 8", "num_heads of 4", "1, 2 or 4"]),
        (["--mesh", "tp=2"], ["tp=2", "mp=N"]),
        (["--mesh", "dp=2", "--rank", "2"], ["--rank 2", "0 to 1"]),
        (["--world", "0"], ["--world", "at least 1"]),
        (["--gpus-per-node", "0"], ["--gpus-per-node", "at least 1"]),
        (["--device", "v100-32g"], ["v100-32g", "bfloat16", "amp.dtype=float16"]),
        (["--world", "100000000000"], ["--world", "65536"]),
        (["--json", "."], ["--json .", "folder"]),
        (["--search", "--world", "4", "--mesh", "mp=2"], ["--search", "--mesh"]),
        (["--device", "b9000"], ["b9000", "h200"]),
    ],
)
def test_an_impossible_plan_is_a_user_error(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "-v", *arguments]) == 2
    output = capsys.readouterr().err
    assert output.count("\n") == 1 and all(word in output for word in words)


def test_a_mesh_text_keeps_the_rest_of_the_config() -> None:
    parallel = ParallelConfig(mp=2, grad_accum_steps=3, bucket_mb=5)
    assert with_mesh(parallel, "dp=8, sharding=1") == ParallelConfig(
        dp=8, mp=2, grad_accum_steps=3, bucket_mb=5, sharding_stage=1
    )
    with pytest.raises(ConfigError, match="sharding"):
        with_mesh(parallel, "sharding")
    assert runs_per_step("update", 4) == 1 and runs_per_step("forward", 4) == 4


def test_the_plan_of_several_image_sizes_sums_up_their_phases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The operations of the whole run are the closed form, the memory is the largest, the time is the sum."""
    config = small_config("train.image_sizes=[[16, 0.5], [32, 0.75], [24, 1.0]]", "train.epochs=2")
    out = tmp_path / "plan.json"
    plan_run(config, "dp=1", None, A100, 0, False, out, num_images=6400)
    plan = json.loads(out.read_text())
    batch, num_steps = config.data.global_batch_size, {16: 100, 32: 50, 24: 50}
    operations = {side: batch * flops.train_flops(shape_of(at_size(config.model, (side, side)))) for side in num_steps}
    assert [(phase["image_size"][0], phase["steps"], phase["share_of_steps"]) for phase in plan["phases"]] == [
        (16, 100, 0.5), (32, 50, 0.25), (24, 50, 0.25)
    ]  # fmt: skip
    assert [phase["flops"]["model"] for phase in plan["phases"]] == [operations[16], operations[32], operations[24]]
    assert plan["run_model_flops"] == sum(count * operations[side] for side, count in num_steps.items())
    assert plan["bytes"]["total"] == max(phase["bytes"]["total"] for phase in plan["phases"])
    assert plan["image_size"] == [32, 32]
    assert {phase["bytes"]["parameters"] for phase in plan["phases"]} == {4 * num_parameters(config)}
    seconds = sum(phase["steps"] * phase["seconds"]["step_at_best"] for phase in plan["phases"])
    assert plan["run"]["hours_at_least"] == pytest.approx(seconds / 3600)
    assert plan["run"]["steps"] == 200
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("all "))
    assert "100 %" in row and "200" in row.split()


def test_a_search_with_several_image_sizes_has_the_mean_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of three quarters of the steps at 16 pixels and one at 32; the memory is that of 32."""
    sizes = ["train.image_sizes=[[16, 0.75], [32, 1.0]]", "train.max_steps=8", "data.global_batch_size=1"]
    out = tmp_path / "plans.json"
    plan_run(small_config(TWO_BLOCKS, *sizes), None, 2, A100, 0, True, out)
    plans = json.loads(out.read_text())
    means = []
    for plan in plans:
        small, large = plan["phases"]
        assert (small["steps"], small["image_size"], large["image_size"]) == (6, [16, 16], [32, 32])
        assert plan["bytes"] == large["bytes"] and large["bytes"] != small["bytes"]
        means.append(0.75 * small["seconds"]["step_at_best"] + 0.25 * large["seconds"]["step_at_best"])
        assert plan["run"]["hours_at_least"] == pytest.approx(8 * means[-1] / 3600)
    assert len(means) == 1  # dp=2 has no image for one rank, pp=2 not two micro-batches
    table, best = capsys.readouterr().out.split("phases; ")
    assert all(f"{1e3 * mean:.2f} ms" in table for mean in means)
    assert [line.split()[0] for line in best.splitlines()[2:] if line.strip()][-3:] == ["16x16", "32x32", "all"]
