"""Mixed precision: which level and dtype a device supports."""

from __future__ import annotations

from dataclasses import dataclass

from vit_static.common import cpu
from vit_static.common.errors import ConfigError
from vit_static.config.model_schema import ModelConfig
from vit_static.config.schema import AmpConfig, KernelsConfig, ParallelConfig
from vit_static.model.attention import AttentionFunction, attention_by_matmul, flash_attention
from vit_static.model.variants import variant_of
from vit_static.program.cpu import onednn

_MAX_FLASH_HEAD_DIM = 256
_AMPERE = (8, 0)  # the first compute capability with bfloat16 and FlashAttention 2


@dataclass(frozen=True)
class Precision:
    """The level and dtype that a program runs in, after resolving `auto`."""

    level: str  # O0, O1, O2
    dtype: str  # the low precision's; float32 for O0


def choose_precision(
    amp: AmpConfig,
    device: str,
    kernels: KernelsConfig | None = None,
    parallel: ParallelConfig | None = None,
    *,
    cpu_has_bfloat16: bool | None = None,
    gpu_capability: tuple[int, int] | None = None,
) -> Precision:
    """Resolve `auto`. Raises ConfigError for a requested precision or kernel that the device doesn't support.

    `cpu_has_bfloat16`: whether the CPU multiplies bfloat16; None detects it. `gpu_capability`: the GPU's compute
    capability; None is for GPUs that aren't here, and supports everything.
    """
    if cpu_has_bfloat16 is None:
        cpu_has_bfloat16 = cpu.cpu_has_bfloat16()
    wants_kernels = kernels is None or kernels.onednn
    has_kernels = device == "cpu" and wants_kernels and onednn.is_supported()
    splits_parameters = parallel is not None and parallel.sharding_stage == 3
    is_before_ampere = gpu_capability is not None and gpu_capability < _AMPERE
    dtype = ("float16" if is_before_ampere else "bfloat16") if amp.dtype == "auto" else amp.dtype
    on_cpu = "O0" if dtype == "bfloat16" and not (cpu_has_bfloat16 and has_kernels and not splits_parameters) else "O1"
    level: str = {"gpu": "O2", "cpu": on_cpu}[device] if amp.level == "auto" else amp.level
    if level == "O0":
        return Precision("O0", "float32")
    if is_before_ampere and gpu_capability is not None:
        _check_before_ampere(gpu_capability, dtype, kernels)
    if device == "cpu" and (level == "O2" or dtype == "float16"):
        raise ConfigError(
            f"amp = {level} in {dtype}: on a CPU the only mixed precision is O1 in bfloat16; "
            "set amp.level=O1 with amp.dtype=bfloat16, or amp.level=O0 (or both auto)"
        )
    if device == "cpu" and splits_parameters:
        raise ConfigError(
            "amp.level = O1: Paddle's CPU build can't gather sharded parameters in bfloat16; set amp.level=O0 (or "
            "auto), or parallel.sharding_stage below 3"
        )
    if device == "cpu" and not has_kernels:
        remedy = "set amp.level=O0 (or auto)" if wants_kernels else "set kernels.onednn=true, or amp.level=O0 (or auto)"
        raise ConfigError(f"amp.level = O1: on a CPU bfloat16 needs our oneDNN kernels; {remedy}")
    if device == "cpu" and not cpu_has_bfloat16:
        raise ConfigError(
            "amp.level = O1: this CPU can't multiply bfloat16 (no AVX512-BF16, no AMX); set amp.level=O0 (or auto)"
        )
    if level == "O1" and dtype == "float16":
        raise ConfigError(
            "amp = O1 in float16: this version has no loss scaling for O1; set amp.dtype=bfloat16, or amp.level=O2"
        )
    return Precision(level, dtype)


def _check_before_ampere(capability: tuple[int, int], dtype: str, kernels: KernelsConfig | None) -> None:
    """Raise ConfigError for what needs a newer GPU: without it Paddle turns mixed precision off with a warning."""
    ours = ".".join(map(str, capability))
    if dtype == "bfloat16":
        raise ConfigError(
            f"amp.dtype = bfloat16: this GPU has compute capability {ours}, and 8.0 is needed; set float16"
        )
    if kernels is None or kernels.flash_attention:
        raise ConfigError(
            f"kernels.flash_attention = true: this GPU has compute capability {ours}, and 8.0 is needed; set false"
        )


def choose_attention(
    model: ModelConfig, precision: Precision, parallel: ParallelConfig, kernels: KernelsConfig, device: str
) -> AttentionFunction:
    """Return the attention function of a run: FlashAttention where it can be used, else plain matrix products.

    On a CPU, program/cpu/lowering.py fuses these products.
    """
    if uses_flash_attention(model, precision, parallel, kernels, device):
        return flash_attention
    return attention_by_matmul


def uses_flash_attention(
    model: ModelConfig, precision: Precision, parallel: ParallelConfig, kernels: KernelsConfig, device: str
) -> bool:
    """Return whether a run uses FlashAttention: on a GPU in half precision, unless the masks must follow the mesh.

    Its kernels exist for heads of up to 256 channels, a multiple of 8.
    """
    variant = variant_of(model)
    head_dim = variant.width // variant.num_heads
    has_kernel = head_dim % 8 == 0 and head_dim <= _MAX_FLASH_HEAD_DIM
    needs_seeded_masks = model.attention_dropout > 0.0 and uses_seeded_dropout(parallel, device)
    is_half = precision.level != "O0"
    return device == "gpu" and kernels.flash_attention and is_half and has_kernel and not needs_seeded_masks


def uses_seeded_dropout(parallel: ParallelConfig, device: str) -> bool:
    """Return whether each dropout draws its masks from a seed of its own (seeded_dropout.py).

    On a GPU only where the rank's one generator would be wrong: reading a seed makes the host wait there.
    """
    return device == "cpu" or parallel.mp > 1 or parallel.recompute != "none"


def newton_schulz_dtype(precision: Precision, device: str) -> str:
    """Return the dtype in which Muon orthogonalizes: bfloat16 on a GPU whose products are in it, else float32."""
    return "bfloat16" if device == "gpu" and precision.dtype == "bfloat16" else "float32"
