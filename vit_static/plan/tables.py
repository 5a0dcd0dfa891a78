"""Tables that the plan verb prints."""

from __future__ import annotations

from pathlib import Path

from vit_static.common.errors import ConfigError
from vit_static.common.hardware import GPUS, RESERVED_BYTES
from vit_static.common.io import write_json
from vit_static.common.terminal import print_table, print_wrapped
from vit_static.common.text import counted, print_text
from vit_static.config.schema import Config
from vit_static.plan.costs import count_by_kind
from vit_static.plan.planner import Cluster, Plan, make_plan, resolve_world_size, search_meshes, with_mesh
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
    if search:
        plans = search_meshes(config, parallel, resolve_world_size(parallel, world_size), cluster)
        print_search(plans, length)
    else:
        plans = [make_plan(config, parallel, resolve_world_size(parallel, world_size), cluster, rank)]
        print_plan(plans[0])
        num_gpus = plans[0].mesh_shape.world_size
        print_wrapped(f"whole run            {length.describe(config, plans[0].step_seconds, num_gpus)}", 21)
    if out is not None:
        values = [
            {**plan.as_json(), "run": length.as_json(plan.step_seconds, plan.mesh_shape.world_size)} for plan in plans
        ]
        write_json(values if search else values[0], out)


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
    return [
        "memory",
        f"  parameters           {_size(costs.parameters)}",
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
    return [
        f"operations per step  {plan.costs.flops(plan.num_micro_batches) / 1e12:.3f} TFLOP on this rank; "
        f"the model's on all ranks {plan.model_flops / 1e12:.3f} TFLOP"
        + (f", {plan.teacher_flops / 1e12:.3f} of it in the teacher" if plan.teacher_flops else ""),
        f"compute              at least {plan.compute_seconds * 1e3:.2f} ms",
        f"communication        at least {plan.communication_seconds * 1e3:.2f} ms",
        f"step                 at least {plan.step_seconds * 1e3:.2f} ms, so at most {plan.images_per_s:,.0f} images/s "
        f"and {100 * plan.mfu:.1f} % MFU",
    ]


def print_search(plans: list[Plan], length: RunLength) -> None:
    """Print the plans of a search as a table, in their order; with the time of the whole run if its length is known."""
    num_steps, num_gpus = length.num_steps, plans[0].mesh_shape.world_size
    rows = [
        (
            str(plan.mesh_shape),
            plan.sharding_stage,
            _size(plan.memory).strip(),
            "yes" if plan.fits else "NO",
            f"{plan.step_seconds * 1e3:.2f} ms",
            f"{plan.images_per_s:,.0f}",
            f"{100 * plan.mfu:.1f} %",
            *([] if num_steps is None else [gpu_hours(num_steps * plan.step_seconds, num_gpus)]),
        )
        for plan in plans
    ]
    headers = ["mesh", "sharding", "memory per rank", "fits", "step at least", "images/s at most", "MFU at most"]
    print_table(
        headers if num_steps is None else [*headers, "GPU-hours at least"],
        rows,
        title=f"{counted(len(plans), 'valid mesh')} of {num_gpus} {plans[0].cluster.device}, the best first",
        right=(1, 2, 4, 5, 6, 7),
    )


def _size(num_bytes: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:>8.2f} {unit}"
    return f"{num_bytes:>8.0f} B "


def _ranks(ranks: tuple[int, ...]) -> str:
    if len(ranks) <= 4:
        return ",".join(map(str, ranks))
    return f"{ranks[0]},{ranks[1]},..,{ranks[-1]} ({len(ranks)})"
