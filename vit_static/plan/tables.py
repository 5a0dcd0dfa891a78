"""Tables that the plan verb prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vit_static.common.errors import ConfigError
from vit_static.common.hardware import GPUS, RESERVED_BYTES
from vit_static.common.io import write_json
from vit_static.config.schema import Config
from vit_static.plan.costs import by_kind
from vit_static.plan.planner import Place, Plan, _world, make_plan, search_meshes, with_mesh


def plan_run(
    config: Config,
    mesh_text: str | None,
    world_size: int | None,
    place: Place,
    rank: int,
    search: bool,
    out: Path | None,
) -> None:
    """The verb: prints the plan of one mesh, or ranks those that can be; writes it as JSON where `out` says."""
    if out is not None and out.is_dir():
        raise ConfigError(f"--json {out}: is a folder; name a file")
    if search and (mesh_text is not None or rank != 0):
        raise ConfigError("--search tries every mesh: give it --world, not --mesh or --rank")
    parallel = with_mesh(config.parallel, mesh_text)
    if search:
        found = search_meshes(config, parallel, _world(parallel, world_size), place)
        print("\n".join(describe_search(found)))
        written: Any = [plan.as_json() for plan in found]
    else:
        plan = make_plan(config, parallel, _world(parallel, world_size), place, rank)
        print("\n".join(describe(plan)))
        written = plan.as_json()
    if out is not None:
        write_json(written, out)


def describe(plan: Plan) -> list[str]:
    found, device = plan.costs, GPUS[plan.place.device]
    stage = (
        f", pipeline stage {plan.rank // (plan.mesh_shape.mp * plan.mesh_shape.dp)}" if plan.mesh_shape.pp > 1 else ""
    )
    lines = [
        f"rank {plan.rank} of {plan.mesh_shape.world_size}{stage}: {plan.mesh_shape}, "
        f"sharding stage {plan.sharding_stage}, recompute {plan.recompute}; "
        f"{plan.global_batch_size} images per step in {plan.num_micro_batches} micro-batches, "
        f"{plan.dtype} on {plan.place.device}, {plan.place.interconnect} between nodes of {plan.place.gpus_per_node}",
        "",
        "memory",
        f"  parameters           {_size(found.parameters)}",
        f"  gradients            {_size(found.gradients)}",
        f"  optimizer state      {_size(found.optimizer_state)}",
        f"  activations' peak   ~{_size(plan.activations)}   an estimate: {_size(found.activations).strip()} of one "
        "micro-batch, each result from its operator to its last reader"
        + (
            f", + {plan.num_in_flight - 1} x {_size(found.forward_kept).strip()} kept by those in flight"
            if plan.num_in_flight > 1
            else ""
        ),
        f"  all at the peak     ~{_size(plan.memory)}   {'fits' if plan.fits else 'DOES NOT FIT'} in "
        f"{_size(device.memory).strip()} less {_size(RESERVED_BYTES).strip()} for context, NCCL and workspaces",
        "",
        "collectives a step",
        "  kind             role       ranks                  count         bytes    at best",
    ]
    for (kind, role, ranks), (count, num_bytes) in by_kind(found.collectives, plan.num_micro_batches).items():
        seconds = sum(
            plan.seconds_of(one) for one in found.collectives if (one.kind, one.role, one.ranks) == (kind, role, ranks)
        )
        lines.append(
            f"  {kind:<16} {role:<10} {_ranks(ranks):<20} {count:>7} {_size(num_bytes):>13} {seconds * 1e3:>7.2f} ms"
        )
    if not found.collectives:
        lines.append("  none")
    lines += [
        "",
        f"operations a step    {found.flops(plan.num_micro_batches) / 1e12:.3f} TFLOP on this rank, "
        f"{plan.model_flops / 1e12:.3f} TFLOP the model's on all",
        f"compute              {plan.compute_seconds * 1e3:.2f} ms at least",
        f"communication        {plan.communication_seconds * 1e3:.2f} ms at least",
        f"a step               {plan.step_seconds * 1e3:.2f} ms at least, so at most {plan.images_per_s:,.0f} images/s "
        f"and {100 * plan.mfu:.1f} % MFU",
    ]
    return lines


def describe_search(plans: list[Plan]) -> list[str]:
    lines = [
        f"{len(plans)} meshes of {plans[0].mesh_shape.world_size} {plans[0].place.device} can be; the best first",
        "  mesh                     sharding   memory a rank         step at least   images/s at most   MFU at most",
    ]
    for plan in plans:
        lines.append(
            f"  {plan.mesh_shape!s:<24} {plan.sharding_stage:>8} {_size(plan.memory):>15} "
            f"{'fits' if plan.fits else 'TOO BIG':<8} {plan.step_seconds * 1e3:>11.2f} ms {plan.images_per_s:>18,.0f} "
            f"{100 * plan.mfu:>11.1f} %"
        )
    return lines


def _size(num_bytes: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:>8.2f} {unit}"
    return f"{num_bytes:>8.0f} B "


def _ranks(ranks: tuple[int, ...]) -> str:
    if len(ranks) <= 4:
        return ",".join(map(str, ranks))
    return f"{ranks[0]},{ranks[1]},..,{ranks[-1]} ({len(ranks)})"
