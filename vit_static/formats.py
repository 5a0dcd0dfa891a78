"""Files of weights, this program's and others': what they are is told by their content, never by their names.

A state is a dict of float32 arrays by name, in PLSC's names and layout ("the files' layout" elsewhere):

    cls_token [1, 1, C]   reg_token [1, R, C]   pos_embed [1, positions, C]
    patch_embed.proj.weight [C, 3, p, p]  .bias
    blocks.N.norm1, .norm2; .attn.qkv [C, 3 C], .attn.proj; .mlp.fc1, .mlp.fc2; .ls1.gamma, .ls2.gamma
    norm   head0 (the tanh layer)   head         linear layers are [in, out]

Every other format is a table of names with what becomes of each array; the same table reads and writes. What a file
says of its model beyond its arrays' shapes, or what its program always does, stands in `Foreign.facts` by the names of
the config's `model` section. Nothing is unpickled but arrays.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
from safetensors.numpy import save_file

from vit_static.config import ModelConfig, UserError
from vit_static.files import write_atomically

State = dict[str, np.ndarray]
FormatName = Literal["plsc", "timm", "huggingface", "google"]


class WeightsError(UserError):
    """A file of weights that can't be read, or doesn't fit the model."""


@dataclass(frozen=True)
class Foreign:
    """What a file holds."""

    state: State
    format: str
    facts: dict[str, Any] = field(default_factory=dict)  # keys of the `model` section
    dropped: dict[str, str] = field(default_factory=dict)  # names in the file that the model has no use for, and why


# -- containers ------------------------------------------------------------------------------------------------------

_TORCH = (
    "is PyTorch's own file, which is a pickle that can run code: write it anew with safetensors.torch.save_file("
    "model.state_dict(), 'model.safetensors'), where you trust it"
)


def read(path: Path) -> Foreign:
    """A file of weights: Paddle's `.pdparams`, `.npz` of Google's programs, `.safetensors` of timm or Hugging Face.

    Raises WeightsError for what is none, or is of a model that this program hasn't. Never runs code from it.
    """
    try:
        with path.open("rb") as file:
            beginning = file.read(16)
    except OSError as error:
        raise WeightsError(f"{path}: can't be read ({error.strerror})") from None
    if beginning[:2] == b"PK":
        return _from_names(_read_npz(path), path)
    if len(beginning) == 16 and beginning[8:9] == b"{" and struct.unpack("<Q", beginning[:8])[0] < 100_000_000:
        return _from_names(_read_safetensors(path), path)
    if beginning[:1] == b"\x80":
        return _translated(_read_pickle(path), PLSC, path)
    raise WeightsError(f"{path}: is no file of weights that is known here: .pdparams, .npz and .safetensors are")


def _float32(array: np.ndarray, dtype: str = "") -> np.ndarray | None:
    """None for what is no number with a fraction. bfloat16 comes as its 16 bits."""
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            return array.astype(np.float32)
    if dtype == "BF16" or array.dtype in (np.dtype("V2"), np.dtype("uint16")):
        return (np.ascontiguousarray(array).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return None


def _read_npz(path: Path) -> State:
    state = {}
    try:
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("data.pkl") for name in archive.namelist()):
                raise WeightsError(f"{path}: {_TORCH}")
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                array = _float32(arrays[name])
                if array is not None:
                    state[name] = array
    except WeightsError:
        raise
    except Exception as error:  # a broken zip or header can raise anything
        raise WeightsError(f"{path}: is not a whole .npz file ({type(error).__name__}: {error})") from None
    return state


def _read_safetensors(path: Path) -> State:
    state = {}
    try:
        for name, tensor in safetensors.deserialize(path.read_bytes()):
            kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}.get(tensor["dtype"])
            if kind is not None:
                array = np.frombuffer(tensor["data"], kind).reshape(tensor["shape"])
                state[name] = np.asarray(_float32(array, tensor["dtype"]))
    except Exception as error:
        raise WeightsError(f"{path}: is not a whole .safetensors file ({type(error).__name__}: {error})") from None
    return state


# What a state dict of arrays needs to be unpickled; whatever else a file asks for is refused.
_HARMLESS = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
}


class _StateUnpickler(pickle.Unpickler):
    """Reads arrays and containers; refuses everything that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "torch":
            raise WeightsError(_TORCH)
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a file of weights has no use for")
        return _HARMLESS[module, name]


_TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # torch.save's, before it wrote zip files


def _read_pickle(path: Path) -> State:
    try:
        with path.open("rb") as file:
            content = _StateUnpickler(file).load()
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    except OSError as error:
        raise WeightsError(f"{path}: can't be read ({error.strerror})") from None
    except Exception as error:  # a broken pickle can raise anything
        raise WeightsError(f"{path}: is not a Paddle state dict ({type(error).__name__}: {error})") from None
    if content == _TORCH_MAGIC:
        raise WeightsError(f"{path}: {_TORCH}")
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds {type(content).__name__}, not a state dict")
    state = {}
    for name, value in content.items():
        array = value[1] if isinstance(value, tuple) and len(value) == 2 else value  # a pickled Tensor: name, data
        if isinstance(name, str) and isinstance(array, np.ndarray):
            as_float = _float32(array)
            if as_float is not None:
                state[name] = as_float
    if not state:
        raise WeightsError(f"{path}: holds no arrays of weights")
    return state


# -- names -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """What becomes of an array on the way in, and on the way out, where the number of heads is known."""

    to_own: Callable[[np.ndarray], np.ndarray]
    from_own: Callable[[np.ndarray, int], np.ndarray]


AS_IT_IS = Change(lambda x: x, lambda x, _: x)
TURNED = Change(lambda x: x.T, lambda x, _: x.T)  # linear layers of torch are [out, in]
IMAGE_LAST = Change(lambda x: x.transpose(3, 2, 0, 1), lambda x, _: x.transpose(2, 3, 1, 0))  # kernels [p, p, 3, C]
TO_HEADS = Change(lambda x: x.reshape(x.shape[0], -1), lambda x, h: x.reshape(x.shape[0], h, -1))  # [C, H, d]
HEADS = Change(lambda x: x.reshape(-1), lambda x, h: x.reshape(h, -1))  # biases [H, d]
FROM_HEADS = Change(lambda x: x.reshape(-1, x.shape[-1]), lambda x, h: x.reshape(h, -1, x.shape[-1]))  # [H, d, C]


@dataclass(frozen=True)
class Table:
    """Another program's names beside ours, with the change; `{}` is a block's number. `ignored` and `refused`: patterns
    of names, and why."""

    format: str
    block: str  # the pattern of a block's number
    names: Mapping[str, tuple[str, Change]]
    facts: Mapping[str, Any] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def for_blocks(self, numbers: Iterable[int]) -> dict[str, tuple[str, Change]]:
        """The names of a model with these blocks."""
        listed = list(numbers)
        return {
            theirs.format(number): (ours.format(number), change)
            for theirs, (ours, change) in self.names.items()
            for number in (listed if "{}" in theirs else [0])
        }

    def blocks_in(self, names: Iterable[str]) -> list[int]:
        return sorted({int(found[1]) for name in names if (found := re.match(self.block, name))})


Names = dict[str, tuple[str, Change]]


def _same(*names: str) -> Names:
    return {name: (name, AS_IT_IS) for name in names}


def _norms(pairs: Mapping[str, str], weight: str = "weight") -> Names:
    return {
        f"{theirs}{kind}": (f"{ours}.{own_kind}", AS_IT_IS)
        for theirs, ours in pairs.items()
        for kind, own_kind in ((weight, "weight"), ("bias", "bias"))
    }


def _linears(pairs: Mapping[str, str], change: Change, kernel: str = "weight") -> Names:
    """Linear layers, whose biases are the same everywhere."""
    found: Names = {}
    for theirs, ours in pairs.items():
        found[f"{theirs}{kernel}"] = (f"{ours}.weight", change)
        found[f"{theirs}bias"] = (f"{ours}.bias", AS_IT_IS)
    return found


_DISTILLED = "a distilled DeiT has two heads, and this model one: take one without distillation"
_ATTENTION_POOL = "pools by attention, and this model by the class token or the mean: take weights with either"
_PRETRAINING = "only pretraining uses it"

_IN_TORCH = {
    "blocks.{}.attn.qkv.": "blocks.{}.attn.qkv",
    "blocks.{}.attn.proj.": "blocks.{}.attn.proj",
    "blocks.{}.mlp.fc1.": "blocks.{}.mlp.fc1",
    "blocks.{}.mlp.fc2.": "blocks.{}.mlp.fc2",
    "head.": "head",
}
_NORMS_IN_TORCH = {"blocks.{}.norm1.": "blocks.{}.norm1", "blocks.{}.norm2.": "blocks.{}.norm2", "norm.": "norm"}
_EMBEDDINGS = _same("cls_token", "reg_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")
_SCALES = _same("blocks.{}.ls1.gamma", "blocks.{}.ls2.gamma")

PLSC = Table(
    "PLSC's or this program's .pdparams",
    r"blocks\.(\d+)\.",
    _EMBEDDINGS | _SCALES | _norms(_NORMS_IN_TORCH) | _linears({**_IN_TORCH, "head0.": "head0"}, AS_IT_IS),
)
TIMM = Table(
    "timm's .safetensors",
    r"blocks\.(\d+)\.",
    _EMBEDDINGS
    | _SCALES
    | _norms({**_NORMS_IN_TORCH, "fc_norm.": "norm"})
    | _linears({**_IN_TORCH, "pre_logits.fc.": "head0"}, TURNED),
    facts={"gelu": "erf", "layer_norm_epsilon": 1e-6},
    ignored={r"mask_token": _PRETRAINING, r"decoder_.*|decoder\..*": _PRETRAINING},
    refused={
        r"dist_token|head_dist\..*": _DISTILLED,
        r"attn_pool\..*": _ATTENTION_POOL,
        r"blocks\.\d+\.attn\.[qk]_norm\..*": "norms queries and keys, and this model doesn't",
        r"norm_pre\..*": "norms before the blocks, as CLIP, and this model doesn't",
        r"blocks\.\d+\.mlp\.(w12|w3|fc1_g|fc1_x)\..*": "has a gated MLP (SwiGLU), and this model a plain one",
    },
)
_HF_BLOCK = "encoder.layer.{}."
_HF_QKV = {
    f"{_HF_BLOCK}attention.attention.{name}.": f"blocks.{{}}.attn.{name[0]}" for name in ("query", "key", "value")
}
_HF_EMBEDDINGS: Names = {
    "embeddings.cls_token": ("cls_token", AS_IT_IS),
    "embeddings.register_tokens": ("reg_token", AS_IT_IS),
    "embeddings.position_embeddings": ("pos_embed", AS_IT_IS),
    "embeddings.patch_embeddings.projection.weight": ("patch_embed.proj.weight", AS_IT_IS),
    "embeddings.patch_embeddings.projection.bias": ("patch_embed.proj.bias", AS_IT_IS),
}
_HF_REFUSED = {
    r"embeddings\.distillation_token|(cls|distillation)_classifier\..*": _DISTILLED,
    r"encoder\.layer\.\d+\.mlp\.weights_(in|out)\..*": "has a gated MLP (SwiGLU), and this model a plain one",
}
HF_VIT = Table(
    "Hugging Face ViT's .safetensors",
    r"encoder\.layer\.(\d+)\.",
    _HF_EMBEDDINGS
    | _norms(
        {
            f"{_HF_BLOCK}layernorm_before.": "blocks.{}.norm1",
            f"{_HF_BLOCK}layernorm_after.": "blocks.{}.norm2",
            "layernorm.": "norm",
        }
    )
    | _linears(
        {
            **_HF_QKV,
            f"{_HF_BLOCK}attention.output.dense.": "blocks.{}.attn.proj",
            f"{_HF_BLOCK}intermediate.dense.": "blocks.{}.mlp.fc1",
            f"{_HF_BLOCK}output.dense.": "blocks.{}.mlp.fc2",
            "classifier.": "head",
        },
        TURNED,
    ),
    facts={"gelu": "erf", "layer_norm_epsilon": 1e-12, "class_position": True},
    ignored={
        r"embeddings\.mask_token": _PRETRAINING,
        r"decoder\..*": _PRETRAINING,
        r"pooler\.dense\..*": "no classifier of Hugging Face's reads it",
    },
    refused=_HF_REFUSED,
)
HF_DINOV2 = Table(
    "Hugging Face DINOv2's .safetensors",
    r"encoder\.layer\.(\d+)\.",
    _HF_EMBEDDINGS
    | {f"{_HF_BLOCK}layer_scale{branch}.lambda1": (f"blocks.{{}}.ls{branch}.gamma", AS_IT_IS) for branch in (1, 2)}
    | _norms({f"{_HF_BLOCK}norm1.": "blocks.{}.norm1", f"{_HF_BLOCK}norm2.": "blocks.{}.norm2", "layernorm.": "norm"})
    | _linears(
        {
            **_HF_QKV,
            f"{_HF_BLOCK}attention.output.dense.": "blocks.{}.attn.proj",
            f"{_HF_BLOCK}mlp.fc1.": "blocks.{}.mlp.fc1",
            f"{_HF_BLOCK}mlp.fc2.": "blocks.{}.mlp.fc2",
            "classifier.": "head",
        },
        TURNED,
    ),
    facts={"gelu": "erf", "layer_norm_epsilon": 1e-6, "class_position": True},
    ignored={r"embeddings\.mask_token": _PRETRAINING},
    refused=_HF_REFUSED,
)


def _google(name: str, attention: str, norms: tuple[str, str], mlp: str, position: str, class_position: bool) -> Table:
    """Flax's layouts, which differ in how the parts of a block are counted."""
    block = "Transformer/encoderblock_{}/"
    return Table(
        name,
        r"Transformer/encoderblock_(\d+)/",
        {
            "cls": ("cls_token", AS_IT_IS),
            position: ("pos_embed", AS_IT_IS),
            "embedding/kernel": ("patch_embed.proj.weight", IMAGE_LAST),
            "embedding/bias": ("patch_embed.proj.bias", AS_IT_IS),
            f"{block}{attention}/out/kernel": ("blocks.{}.attn.proj.weight", FROM_HEADS),
            f"{block}{attention}/out/bias": ("blocks.{}.attn.proj.bias", AS_IT_IS),
        }
        | {
            f"{block}{attention}/{part}/{kind}": (f"blocks.{{}}.attn.{part[0]}.{own_kind}", change)
            for part in ("query", "key", "value")
            for kind, own_kind, change in (("kernel", "weight", TO_HEADS), ("bias", "bias", HEADS))
        }
        | _norms(
            {
                f"{block}{norms[0]}/": "blocks.{}.norm1",
                f"{block}{norms[1]}/": "blocks.{}.norm2",
                "Transformer/encoder_norm/": "norm",
            },
            "scale",
        )
        | _linears(
            {
                f"{block}{mlp}/Dense_0/": "blocks.{}.mlp.fc1",
                f"{block}{mlp}/Dense_1/": "blocks.{}.mlp.fc2",
                "pre_logits/": "head0",
                "head/": "head",
            },
            AS_IT_IS,
            "kernel",
        ),
        facts={"gelu": "tanh", "layer_norm_epsilon": 1e-6, "class_position": class_position},
        refused={r"MAPHead_0/.*": _ATTENTION_POOL},
    )


_PUBLISHED = ("MultiHeadDotProductAttention_1", ("LayerNorm_0", "LayerNorm_2"), "MlpBlock_3")
_BY_CLASS = ("MultiHeadDotProductAttention_0", ("LayerNorm_0", "LayerNorm_1"), "MlpBlock_0")  # as Flax counts now
_WITH_CLASS, _OF_PATCHES = "Transformer/posembed_input/pos_embedding", "pos_embedding"
VIT_JAX = _google("vit_jax's .npz", *_PUBLISHED, _WITH_CLASS, class_position=True)
VIT_JAX_NOW = _google("vit_jax's .npz", *_BY_CLASS, _WITH_CLASS, class_position=True)
BIG_VISION = _google("big_vision's .npz", *_BY_CLASS, _OF_PATCHES, class_position=False)


def _from_names(state: State, path: Path) -> Foreign:
    """A file whose program its names tell."""
    for ending, translate in (
        ("embedding/kernel", _from_google),
        ("embeddings.patch_embeddings.projection.weight", _from_huggingface),
        ("patch_embed.proj.weight", _from_timm),
    ):
        found = min((name for name in state if name.endswith(ending)), key=len, default=None)
        if found is not None:
            return translate(state, found.removesuffix(ending), path)
    shown = ", ".join(sorted(state)[:3]) or "none"
    raise WeightsError(f"{path}: is of no Vision Transformer that is known here; its arrays begin with {shown}")


def _from_timm(state: State, prefix: str, path: Path) -> Foreign:
    return _translated(_below(state, prefix), TIMM, path)


def _below(state: State, prefix: str) -> State:
    """Names without a prefix; those that haven't it stay."""
    return {name.removeprefix(prefix): array for name, array in state.items()}


def _from_google(state: State, prefix: str, path: Path) -> Foreign:
    given = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
    outside = {name: "is not of the model" for name in state if not name.startswith(prefix)}
    given = _unscanned(given)
    counts_by_class = any("/MlpBlock_0/" in name for name in given)
    table = (VIT_JAX_NOW if _WITH_CLASS in given else BIG_VISION) if counts_by_class else VIT_JAX
    found = _translated(given, table, path)
    for name, array in given.items():
        if name.endswith("/query/kernel") and array.ndim == 3:
            found.facts["num_heads"] = array.shape[1]
    return Foreign(found.state, found.format, found.facts, found.dropped | outside)


def _unscanned(state: State) -> State:
    """Blocks that big_vision keeps along an axis of each array (`scan`), each by itself."""
    scanned = "Transformer/encoderblock/"
    given = {name: array for name, array in state.items() if not name.startswith(scanned)}
    for name, array in state.items():
        if name.startswith(scanned):
            for number, of_block in enumerate(array):
                given[f"Transformer/encoderblock_{number}/{name.removeprefix(scanned)}"] = of_block
    return given


def _from_huggingface(state: State, prefix: str, path: Path) -> Foreign:
    given = _below(state, prefix)
    table = HF_DINOV2 if any(".layer_scale1." in name for name in given) else HF_VIT
    found = _translated(given, table, path)
    facts = found.facts | _said_by_config(path.with_name("config.json"))
    return Foreign(found.state, found.format, facts, found.dropped)


def _said_by_config(path: Path) -> dict[str, Any]:
    """What Hugging Face's config.json beside the weights says that they don't."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    facts: dict[str, Any] = {}
    if isinstance(said, dict):
        if isinstance(said.get("num_attention_heads"), int):
            facts["num_heads"] = said["num_attention_heads"]
        if isinstance(said.get("layer_norm_eps"), float):
            facts["layer_norm_epsilon"] = said["layer_norm_eps"]
        if said.get("hidden_act") in ("gelu_new", "gelu_pytorch_tanh"):
            facts["gelu"] = "tanh"
    return facts


def _translated(state: State, table: Table, path: Path) -> Foreign:
    """Our names and layout. Raises WeightsError for an array that the table neither has nor explains."""
    names = table.for_blocks(table.blocks_in(state))
    own: State = {}
    dropped: dict[str, str] = {}
    unexpected = []
    for name, array in state.items():
        reason = next((why for pattern, why in table.refused.items() if re.fullmatch(pattern, name)), None)
        if reason is not None:
            raise WeightsError(f"{path}: {name}: {reason}")
        reason = next((why for pattern, why in table.ignored.items() if re.fullmatch(pattern, name)), None)
        if reason is not None:
            dropped[name] = reason
        elif name in names:
            own_name, change = names[name]
            try:
                own[own_name] = np.ascontiguousarray(change.to_own(array))
            except (ValueError, IndexError):
                raise WeightsError(
                    f"{path}: {name} has the shape {list(array.shape)}, which is no {own_name}"
                ) from None
        else:
            unexpected.append(name)
    if unexpected:
        more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        raise WeightsError(f"{path}: taken for {table.format}, but has {unexpected[0]}{more}, which these have not")
    try:
        return Foreign(
            fuse_qkv(own), table.format, dict(table.facts) | _pooling(own, "fc_norm.weight" in state), dropped
        )
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{path}: its queries, keys and values don't belong together ({error})") from None


def _pooling(state: State, has_norm_after: bool) -> dict[str, Any]:
    """What the head reads, as far as the arrays tell: with a class token timm's mean without a norm of its own looks
    as the class token's own head does."""
    reads = "cls" if "cls_token" in state else "gap"
    embedding, head = state.get("patch_embed.proj.weight"), state.get("head0.weight", state.get("head.weight"))
    if embedding is not None and head is not None and head.shape[:1] == (2 * embedding.shape[0],):
        reads = "cls_gap"
    return {"pool": "gap", "norm_after_pool": True} if has_norm_after else {"pool": reads}


def fuse_qkv(state: Mapping[str, np.ndarray]) -> State:
    """From the layers' names to the files': ``attn.{q,k,v}.*`` become ``attn.qkv.*``, side by side in that order."""
    fused = {}
    for name, value in state.items():
        if ".attn.q." in name:
            parts = [state[name.replace(".attn.q.", f".attn.{part}.")] for part in "qkv"]
            fused[name.replace(".attn.q.", ".attn.qkv.")] = np.concatenate(parts, axis=-1)
        elif ".attn.k." not in name and ".attn.v." not in name:
            fused[name] = value
    return fused


def split_qkv(state: Mapping[str, np.ndarray]) -> State:
    """From the files' names to the layers': the inverse of `fuse_qkv`."""
    split = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            for part, columns in zip("qkv", np.split(value, 3, axis=-1), strict=True):
                split[name.replace(".attn.qkv.", f".attn.{part}.")] = columns
        else:
            split[name] = value
    return split


# -- writing ---------------------------------------------------------------------------------------------------------


def write(state: Mapping[str, np.ndarray], model: ModelConfig, num_heads: int, path: Path, to: FormatName) -> None:
    """Writes a state in another program's format, beside Hugging Face's the config.json that it is read with.

    Raises WeightsError for a model that the other program hasn't.
    """
    table = _table_for(state, model, to)
    given = dict(state) if table is TIMM else split_qkv(state)
    numbers = PLSC.blocks_in(state)
    written: State = {}
    for theirs, (own_name, change) in table.for_blocks(numbers).items():
        if own_name in given and _is_its_norm(theirs, model):
            written[theirs] = np.ascontiguousarray(change.from_own(given.pop(own_name), num_heads))
    if given:
        raise WeightsError(f"{path}: {table.format} has no {next(iter(given))}")
    with write_atomically(path) as temporary:
        if to == "google":
            with temporary.open("wb") as file:
                np.savez(file, **written)  # type: ignore[arg-type]
        elif to == "timm":
            save_file(written, temporary, {"format": "pt"})
        else:
            kind = _huggingface_kind(state)
            if "reg_token" in state:  # from_pretrained wants one
                written["embeddings.mask_token"] = np.zeros_like(state["cls_token"][0])
            named = {k if k.startswith("classifier.") else f"{kind}.{k}": v for k, v in written.items()}
            save_file(named, temporary, {"format": "pt"})
    if to == "huggingface":
        with write_atomically(path.with_name("config.json")) as temporary:
            temporary.write_text(
                json.dumps(_huggingface_config(state, model, num_heads), indent=2) + "\n", encoding="utf-8"
            )


def _is_its_norm(theirs: str, model: ModelConfig) -> bool:
    """Of timm's two names of the last norm the one that it has; every other name."""
    return not theirs.startswith(("norm.", "fc_norm.")) or theirs.startswith("fc_norm.") == model.norm_after_pool


def _table_for(state: Mapping[str, np.ndarray], model: ModelConfig, to: FormatName) -> Table:
    """Raises WeightsError where the other program would compute something else."""
    has_scale = "blocks.0.ls1.gamma" in state
    if to == "timm":
        if model.pool == "cls_gap":
            raise WeightsError("timm's ViT reads the class token or the mean, and these weights both; --to huggingface")
        return TIMM
    if model.norm_after_pool:
        raise WeightsError(f"these weights' norm comes after the pooling, which {to} has not; timm has")
    if to == "google":
        if has_scale:
            raise WeightsError("Google's ViT has no LayerScale: fold it into the weights, --fold-layer-scale")
        if model.register_tokens or model.pool == "cls_gap":
            raise WeightsError(
                "Google's ViT has neither registers nor both poolings at once; --format timm or huggingface"
            )
        return VIT_JAX if model.class_position or not model.has_class_token else BIG_VISION
    if model.pool == "gap" or not model.has_class_token or not model.class_position:
        raise WeightsError("Hugging Face's ViT reads the class token, which has a position: --format timm")
    if (model.pool == "cls_gap") != has_scale or model.representation_size:
        raise WeightsError(
            "Hugging Face has the ViT (class token) without LayerScale, and DINOv2 (both poolings) with it: "
            "--format timm, or --fold-layer-scale"
        )
    return HF_DINOV2 if has_scale else HF_VIT


def _huggingface_kind(state: Mapping[str, np.ndarray]) -> str:
    """Its model_type, which is also what its names begin with."""
    if "blocks.0.ls1.gamma" not in state:
        return "vit"
    return "dinov2_with_registers" if "reg_token" in state else "dinov2"


def _huggingface_config(state: Mapping[str, np.ndarray], model: ModelConfig, num_heads: int) -> dict[str, Any]:
    kind = _huggingface_kind(state)
    width, mlp_dim = state["blocks.0.mlp.fc1.weight"].shape
    height, columns = model.image_size
    name = {"vit": "ViT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}[kind]
    common = {
        "architectures": [f"{name}ForImageClassification"],
        "model_type": kind,
        "hidden_size": width,
        "num_hidden_layers": len(PLSC.blocks_in(state)),
        "num_attention_heads": num_heads,
        "patch_size": state["patch_embed.proj.weight"].shape[2],
        "image_size": height if height == columns else [height, columns],
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "layer_norm_eps": model.layer_norm_epsilon,
        "hidden_act": "gelu" if model.gelu == "erf" else "gelu_pytorch_tanh",
    }
    if "head.bias" in state:
        common["id2label"] = {str(label): f"LABEL_{label}" for label in range(len(state["head.bias"]))}
    if kind == "vit":
        return {**common, "intermediate_size": mlp_dim}
    ratio = mlp_dim / width  # a whole number, by transformers 5
    own = {"mlp_ratio": int(ratio) if ratio.is_integer() else ratio, "use_swiglu_ffn": False}
    if kind == "dinov2":
        return {**common, **own, "use_mask_token": False}
    return {**common, **own, "num_register_tokens": state["reg_token"].shape[1]}
