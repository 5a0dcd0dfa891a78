"""Tables that the plan verb prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vit_static.common.errors import ConfigError
from vit_static.common.hardware import GPUS, RESERVED_BYTES
from vit_static.common.io import write_json
from vit_static.common.terminal import print_table, print_wrapped
from vit_static.common.text import counted, print_text
from vit_static.config.schema import Config
from vit_static.optim.schedule import Phase
from vit_static.plan.costs import count_by_kind
from vit_static.plan.planner import (
    Cluster,
    PhasePlans,
    Plan,
    make_phase_plans,
    resolve_world_size,
    search_meshes,
    with_mesh,
)
from vit_static.plan.run_length import RunLength, gpu_hours, run_length


def plan_run(
    config: Config,
    mesh_text: str | None,
    world_size: int | None,
    cluster: Cluster,
    rank: int,
    search: bool,
    out: Path | None,
    num_images: int | None = None,
) -> None:
    """Print the plan of one mesh, or with `search` those of all valid meshes; write them to `out` as JSON.

    `num_images`: the number of training images, for the time of the whole run; None: that of the config's data set.
    Raises ConfigError for options that contradict each other or that no mesh satisfies.
    """
    if out is not None and out.is_dir():
        raise ConfigError(f"--json {out}: is a folder; name a file")
    if search and (mesh_text is not None or rank != 0):
        raise ConfigError("--search tries every mesh; combine it with --world, not with --mesh or --rank")
    parallel = with_mesh(config.parallel, mesh_text)
    length = run_length(config, num_images)
    world_size = resolve_world_size(parallel, world_size)
    values: Any
    if search:
        runs = search_meshes(config, parallel, world_size, cluster, length.num_steps)
        print_search(runs, length)
        if len(runs[0].phases) > 1:
            print_phases(runs[0], length, "the first mesh")
        values = [_as_json(run, length) for run in runs]
    else:
        run = make_phase_plans(config, parallel, world_size, cluster, rank, length.num_steps)
        print_plan(run.largest)
        if len(run.phases) > 1:
            print_phases(run, length, "the plan above")
        values = _as_json(run, length)
        print_wrapped(f"whole run            {length.describe(config, run.step_seconds, world_size)}", 21)
    if out is not None:
        write_json(values, out)


def print_phases(run: PhasePlans, length: RunLength, where: str) -> None:
    """Print the costs of each phase of a run (train.image_sizes), and of all of them if the run's length is known.

    `where` the costs of the images with most memory have been printed.
    """
    num_steps = sum(phase.end - phase.start for phase, _ in run.phases)
    rows = []
    for phase, plan in run.phases:
        count = phase.end - phase.start
        memory = f"{_size(plan.memory).strip()}{'' if plan.fits else ' (DOES NOT FIT)'}"
        row = [_pixels(phase), f"{100 * count / num_steps:.4g} %", memory, f"{plan.step_seconds * 1e3:.2f} ms"]
        rows.append([*row, f"{100 * plan.mfu:.1f} %", *_totals([(phase, plan)], length)])
    row = ["all", "100 %", _size(run.largest.memory).strip(), f"{run.step_seconds * 1e3:.2f} ms"]
    rows.append([*row, "", *_totals(run.phases, length)])
    headers = ["images", "steps", "memory per rank", "step at least", "MFU at most"]
    headers += [] if length.num_steps is None else ["number of steps", "model's PFLOP", "GPU-hours at least"]
    print_text("")
    print_table(
        headers,
        rows,
        title=f"phases; the memory of {where} is that of images of {_pixels(run.largest)}",
        right=range(1, 8),
    )
    print_text("")


def _pixels(of: Phase | Plan) -> str:
    return f"{of.image_size[0]}x{of.image_size[1]}"


def _totals(run: list[tuple[Phase, Plan]], length: RunLength) -> list[str]:
    """Return the number of steps, the model's operations and the GPU-hours of phases, if the run's length is known."""
    if length.num_steps is None:
        return []
    num_steps = sum(phase.end - phase.start for phase, _ in run)
    seconds = sum((phase.end - phase.start) * plan.step_seconds for phase, plan in run)
    operations = sum((phase.end - phase.start) * plan.model_flops for phase, plan in run)
    return [f"{num_steps:,}", f"{operations / 1e15:,.4g}", gpu_hours(seconds, run[0][1].mesh_shape.world_size)]


def _as_json(run: PhasePlans, length: RunLength) -> dict[str, Any]:
    """Return the plan with most memory and the run's length, and several phases, as JSON values.

    `steps` is null, and with it all sums, if the run's length isn't known.
    """
    largest = run.largest
    values = {**largest.as_json(), "run": length.as_json(run.step_seconds, largest.mesh_shape.world_size)}
    if len(run.phases) == 1:
        return values
    num_steps = sum(phase.end - phase.start for phase, _ in run.phases)
    entries = []
    for phase, plan in run.phases:
        count = phase.end - phase.start
        share = {"steps": None if length.num_steps is None else count, "share_of_steps": count / num_steps}
        entries.append({**share, **plan.as_json()})
    operations = sum((phase.end - phase.start) * plan.model_flops for phase, plan in run.phases)
    return {**values, "phases": entries, "run_model_flops": None if length.num_steps is None else operations}


def print_plan(plan: Plan) -> None:
    """Print a plan: the rank, its memory, its collectives, and the time of a step."""
    print_wrapped("\n".join([_describe_run(plan), "", *_describe_memory(plan), "", "collectives per step"]), 23)
    _print_collectives(plan)
    print_wrapped("\n".join(["", *_describe_time(plan)]), 21)


def _describe_run(plan: Plan) -> str:
    shape, cluster = plan.mesh_shape, plan.cluster
    stage = f", pipeline stage {plan.rank // (shape.mp * shape.dp)}" if shape.pp > 1 else ""
    return (
        f"rank {plan.rank} of {shape.world_size}{stage}: {shape}, "
        f"sharding stage {plan.sharding_stage}, recompute {plan.recompute}; "
        f"{counted(plan.global_batch_size, 'image')} per step in {counted(plan.num_micro_batches, 'micro-batch')}, "
        f"{plan.dtype} on {cluster.device}, {cluster.interconnect} between nodes of {cluster.gpus_per_node}"
    )


def _describe_memory(plan: Plan) -> list[str]:
    costs = plan.costs
    in_flight = (
        f", + {plan.num_in_flight - 1} x {_size(costs.kept_activations).strip()} kept by the others in flight"
        if plan.num_in_flight > 1
        else ""
    )
    frozen = f"   {_millions(plan.num_trained)} trained, {_millions(plan.num_frozen)} frozen" if plan.num_frozen else ""
    return [
        "memory",
        f"  parameters           {_size(costs.parameters)}{frozen}",
        *([f"  teacher's parameters {_size(costs.teacher)}"] if costs.teacher else []),
        f"  gradients            {_size(costs.gradients)}",
        f"  optimizer state      {_size(costs.optimizer_state)}",
        f"  activations, peak   ~{_size(plan.activations)}   estimate: {_size(costs.activations).strip()} of one "
        f"micro-batch, each result from its operator to its last reader{in_flight}",
        f"  total, peak         ~{_size(plan.memory)}   {'fits' if plan.fits else 'DOES NOT FIT'} in "
        f"{_size(GPUS[plan.cluster.device].memory).strip()} less {_size(RESERVED_BYTES).strip()} for context, NCCL and "
        "workspaces",
    ]


def _print_collectives(plan: Plan) -> None:
    all_of_step = plan.costs.collectives
    rows = []
    for (kind, role, ranks), (count, num_bytes) in count_by_kind(all_of_step, plan.num_micro_batches).items():
        seconds = sum(
            plan.seconds_of(one) for one in all_of_step if (one.kind, one.role, one.ranks) == (kind, role, ranks)
        )
        rows.append((kind, role, _ranks(ranks), count, _size(num_bytes).strip(), f"{seconds * 1e3:.2f} ms"))
    if rows:
        print_table(("kind", "role", "ranks", "count", "bytes", "time at least"), rows, right=(3, 4, 5))
    else:
        print_text("  none")


def _describe_time(plan: Plan) -> list[str]:
    share = plan.share_of_all_tokens
    return [
        f"operations per step  {plan.costs.flops(plan.num_micro_batches) / 1e12:.3f} TFLOP on this rank; "
        f"the model's on all ranks {plan.model_flops / 1e12:.3f} TFLOP"
        + (f", {plan.teacher_flops / 1e12:.3f} of it in the teacher" if plan.teacher_flops else "")
        + (f"; {100 * share:.1f} % of the count for all tokens" if share < 1.0 else ""),
        f"compute              at least {plan.compute_seconds * 1e3:.2f} ms",
        f"communication        at least {plan.communication_seconds * 1e3:.2f} ms",
        f"step                 at least {plan.step_seconds * 1e3:.2f} ms, so at most {plan.images_per_s:,.0f} images/s "
        f"and {100 * plan.mfu:.1f} % MFU",
    ]


def print_search(runs: list[PhasePlans], length: RunLength) -> None:
    """Print the plans of a search as a table, in their order; with the time of the whole run if its length is known.

    With several sizes of training images: the memory of the largest, and the means over the steps.
    """
    first = runs[0].largest
    num_steps, num_gpus = length.num_steps, first.mesh_shape.world_size
    rows = []
    for run in runs:
        plan, seconds = run.largest, run.step_seconds
        mfu = run.mean(lambda plan: plan.mfu * plan.step_seconds) / seconds
        row = [str(plan.mesh_shape), plan.sharding_stage, _size(plan.memory).strip(), "yes" if plan.fits else "NO"]
        row += [f"{seconds * 1e3:.2f} ms", f"{plan.global_batch_size / seconds:,.0f}", f"{100 * mfu:.1f} %"]
        rows.append(row if num_steps is None else [*row, gpu_hours(num_steps * seconds, num_gpus)])
    headers = ["mesh", "sharding", "memory per rank", "fits", "step at least", "images/s at most", "MFU at most"]
    print_table(
        headers if num_steps is None else [*headers, "GPU-hours at least"],
        rows,
        title=f"{counted(len(runs), 'valid mesh')} of {num_gpus} {first.cluster.device}, the best first",
        right=(1, 2, 4, 5, 6, 7),
    )


def _millions(number: int) -> str:
    return f"{number / 1e6:.2f} M"


def _size(num_bytes: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:>8.2f} {unit}"
    return f"{num_bytes:>8.0f} B "


def _ranks(ranks: tuple[int, ...]) -> str:
    if len(ranks) <= 4:
        return ",".join(map(str, ranks))
    return f"{ranks[0]},{ranks[1]},..,{ranks[-1]} ({len(ranks)})"
