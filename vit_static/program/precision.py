"""Mixed precision: which level and dtype a device supports."""

from __future__ import annotations

from dataclasses import dataclass

from vit_static.common import cpu
from vit_static.common.errors import ConfigError
from vit_static.config.schema import AmpConfig, KernelsConfig, ModelConfig, ParallelConfig
from vit_static.model.vit import AttentionFunction, attention_by_matmul, flash_attention


@dataclass(frozen=True)
class Precision:
    """What runs, where `amp` may say auto: the level, and the low precision's dtype (float32 for O0)."""

    level: str
    dtype: str


def choose_precision(
    amp: AmpConfig,
    device: str,
    kernels: KernelsConfig | None = None,
    parallel: ParallelConfig | None = None,
    *,
    cpu_has_bfloat16: bool | None = None,
) -> Precision:
    """Raises ConfigError for what the device can't do: nothing becomes another precision by itself.

    `cpu_has_bfloat16` None: this machine's.
    """
    if cpu_has_bfloat16 is None:
        cpu_has_bfloat16 = cpu.cpu_has_bfloat16()
    has_kernels = kernels is None or kernels.onednn
    splits_parameters = parallel is not None and parallel.sharding_stage == 3
    dtype = "bfloat16" if amp.dtype == "auto" else amp.dtype
    on_cpu = "O0" if dtype == "bfloat16" and not (cpu_has_bfloat16 and has_kernels and not splits_parameters) else "O1"
    level: str = {"gpu": "O2", "cpu": on_cpu}[device] if amp.level == "auto" else amp.level
    if level == "O0":
        return Precision("O0", "float32")
    if device == "cpu" and (level == "O2" or dtype == "float16"):
        raise ConfigError(
            f"amp = {level} in {dtype}: a CPU has bfloat16 autocast alone; "
            "set amp.level=O1 with amp.dtype=bfloat16, or amp.level=O0 (or both auto)"
        )
    if device == "cpu" and splits_parameters:
        raise ConfigError(
            "amp.level = O1: Paddle's CPU build gathers no parameters in bfloat16; set amp.level=O0 (or auto), or "
            "parallel.sharding_stage below 3"
        )
    if device == "cpu" and not has_kernels:
        raise ConfigError(
            "amp.level = O1: on a CPU oneDNN multiplies bfloat16; set kernels.onednn=true, or amp.level=O0 (or auto)"
        )
    if device == "cpu" and not cpu_has_bfloat16:
        raise ConfigError(
            "amp.level = O1: this CPU doesn't multiply bfloat16 (no AVX512-BF16, no AMX); set amp.level=O0 (or auto)"
        )
    if level == "O1" and dtype == "float16":
        raise ConfigError(
            "amp = O1 in float16: its loss would go unscaled in this version; set amp.dtype=bfloat16, or amp.level=O2"
        )
    return Precision(level, dtype)


def choose_attention(
    config: ModelConfig, parallel: ParallelConfig, kernels: KernelsConfig, device: str
) -> AttentionFunction:
    """The attention for a run: on a card the fused one, unless its masks must follow the mesh. On a CPU plain products,
    which cpu_kernels.py fuses."""
    own_masks = config.attention_dropout > 0.0 and _seeds_dropout(parallel, device)
    if device == "gpu" and kernels.flash_attention and not own_masks:
        return flash_attention
    return attention_by_matmul


def _seeds_dropout(parallel: ParallelConfig, device: str) -> bool:
    """Whether masks are drawn from seeds of their own. On a card only where nothing else is right: reading a seed there
    makes the host wait."""
    return device == "cpu" or parallel.mp > 1 or parallel.recompute != "none"
