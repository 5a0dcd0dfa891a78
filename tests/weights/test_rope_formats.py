"""Files of other programs' models with rotary positions or gated MLPs: our model gives their output, at the size of the
file's images and at others, and files written back have the same bits (tests/reference/make_peer_weights_rope.py).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import paddle
import pytest
from helpers.small import model_logits
from helpers.weight_files import WEIGHTS, read_with_model, reference_logits, safetensors_entries, save_changed
from reference.option_cases import COMMON, IMAGE_SIZE, OURS
from safetensors.numpy import save_file

from vit_static.common.errors import ConfigError, WeightsError
from vit_static.config.loader import load_config
from vit_static.config.schema import InitConfig
from vit_static.model.vit import VisionTransformer
from vit_static.weights.convert import convert_state, write_converted
from vit_static.weights.formats import ExternalWeights, FormatName, read_weights
from vit_static.weights.infer import format_override, infer_config
from vit_static.weights.load import init_from, write_pdparams
from vit_static.weights.published import published_num_heads
from vit_static.weights.rope_order import channel_order, from_rope_order, to_rope_order
from vit_static.weights.source import with_model_of_init

KEEP = InitConfig(head="keep", pos_embed="antialias")
PATCH = 3


class Case(NamedTuple):
    overrides: tuple[str, ...]  # of keys that the file doesn't determine, beside the image size
    to: FormatName  # the format that is written back, or into which the authors' own is converted
    is_original: bool = False


HEADS = "model.num_heads=2"
CASES = {
    "timm_dinov3": Case((HEADS,), "timm"),
    "timm_dinov3_plus": Case((HEADS, "model.pool=cls"), "timm"),
    "timm_eva02": Case((HEADS,), "timm"),
    "timm_eva02_clip": Case((HEADS,), "timm"),
    "timm_eva02_small": Case((HEADS,), "timm"),
    "timm_eva": Case((HEADS,), "timm"),
    "timm_reg1_gap": Case((HEADS,), "timm"),
    "timm_axial": Case((HEADS,), "timm"),
    "timm_axial_ape": Case((HEADS, "model.rope=axial"), "timm"),
    "timm_mixed_ape": Case((), "timm"),
    "timm_vit_norms": Case((), "timm"),
    "timm_reg4_gap": Case((HEADS,), "timm"),
    "timm_reg4_positions": Case((HEADS,), "timm", is_original=True),  # written with the positions in the registers
    "timm_giant": Case((HEADS,), "timm"),
    "hf_giant": Case((), "huggingface"),
    "hf_dinov3": Case((), "huggingface"),
    "hf_dinov3_plus": Case((), "huggingface"),
    "dinov3": Case((), "timm", is_original=True),
    "dinov3_plus": Case((), "huggingface", is_original=True),
    "eva02": Case((), "timm", is_original=True),
    "eva02_small": Case((), "timm", is_original=True),
    "rope_vit_mixed": Case((HEADS,), "timm", is_original=True),
    "rope_vit5": Case((), "plsc", is_original=True),
}
# The program reads one size, or resamples otherwise.
SQUARE_ONLY = ("hf_giant", "eva02", "eva02_small", "rope_vit_mixed", "rope_vit5")


def path_of(case: str) -> Path:
    folder = WEIGHTS / case
    return folder / "model.safetensors" if folder.is_dir() else folder.with_suffix(".safetensors")


def read(case: str, label: str = "") -> tuple[ExternalWeights, Any, np.ndarray, np.ndarray]:
    """Read a file, its model for the images of a label, and those with the output of the file's program."""
    arrays = np.load(WEIGHTS / "rope.npz")
    images, expected = arrays[f"{case}/{label}images"], arrays[f"{case}/{label}logits"]
    external = read_weights(path_of(case))
    size = [f"model.image_size=[{images.shape[2]},{images.shape[3]}]"]
    model = infer_config(external, case, [*CASES[case].overrides, *size], saved_size(case)).model
    return external, model, images, expected


def saved_size(case: str) -> tuple[int, int]:
    """Return the image size that a file's weights were saved with."""
    height, width = np.load(WEIGHTS / "rope.npz")[f"{case}/images"].shape[2:]
    return height, width


def grid_of_file(case: str) -> tuple[int, int]:
    height, width = saved_size(case)
    return height // PATCH, width // PATCH


@pytest.mark.parametrize(
    ("case", "label"),
    [(case, label) for case in CASES for label in ("", "other_") if not label or case not in SQUARE_ONLY],
)
def test_another_programs_weights_give_its_output(case: str, label: str) -> None:
    external, model, images, expected = read(case, label)
    built = VisionTransformer(model)
    report = init_from(built, model, external, case, KEEP, grid_of_file(case))
    assert not report.reinitialized
    assert all("no array determines" in note for note in report.notes), report.notes
    logits = model_logits(built, paddle.to_tensor(images))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_a_round_trip_gives_the_same_bits(tmp_path: Path, case: str) -> None:
    """Through a file of this program, and back to the file's own format, or from the authors' to another and back."""
    external, model, *_ = read(case)
    state, _ = convert_state(external, model, case, KEEP, grid_of_file(case))
    write_converted(state, model, tmp_path / "own.pdparams", "plsc")
    own = read_weights(tmp_path / "own.pdparams")
    assert own.model == model and infer_config(own, case, []).model == model
    target = tmp_path / "back.safetensors"
    write_converted(own.state, model, target, CASES[case].to)
    again = read_weights(target)
    assert again.model == model
    back, _ = convert_state(again, infer_config(again, case, []).model, case, KEEP, grid_of_file(case))
    assert back.keys() == state.keys()
    assert all(back[name].tobytes() == state[name].tobytes() for name in state)
    if CASES[case].is_original:
        return
    theirs, ours = safetensors_entries(path_of(case)), safetensors_entries(target)
    # DINOv2 doesn't need its mask token, and DINOv3's is written as zeros.
    assert theirs.keys() - ours.keys() <= {"dinov2.embeddings.mask_token"} and ours.keys() <= theirs.keys()
    for name, entry in ours.items():
        assert entry["shape"] == theirs[name]["shape"] and entry["dtype"] == theirs[name]["dtype"], name
        assert name.endswith("mask_token") or bytes(entry["data"]) == bytes(theirs[name]["data"]), name
    if CASES[case].to == "huggingface":
        written, original = (json.loads((path.parent / "config.json").read_text()) for path in (target, path_of(case)))
        differing = {key for key, value in written.items() if original.get(key) != value}
        assert differing <= {"use_mask_token", "id2label"}


# What files don't say


def test_published_numbers_of_heads() -> None:
    """S+ has the heads of S, and H+ has 20 where H/14 has 16."""
    assert published_num_heads(384, 12, 1536, "swiglu") == published_num_heads(384, 12, 1536, "gelu") == 6
    assert published_num_heads(1280, 32, 5120, "swiglu") == 20
    assert published_num_heads(1280, 32, 5120, "gelu") == 16
    assert published_num_heads(1280, 32, 5121, "gelu") is None


@pytest.mark.parametrize(("case", "key"), [("timm_dinov3_plus", "pool"), ("timm_axial_ape", "rope")])
def test_what_no_array_determines_is_asked_for(case: str, key: str) -> None:
    external = read_weights(path_of(case))
    known = [HEADS, "model.image_size=[9,15]"]
    with pytest.raises(WeightsError, match=rf"no array determines .*set -o model\.{key}="):
        infer_config(external, case, known)
    start = load_config(None, [f"init.from={path_of(case)}", "model.from=init", "init.head=keep", *known])
    with pytest.raises(ConfigError, match=rf"doesn't determine {key}; set model\.{key} too"):
        with_model_of_init(start)
    model = infer_config(external, case, [*known, *CASES[case].overrides]).model
    report = convert_state(external, model, case, KEEP, grid_of_file(case))[1]
    assert any(f"no array determines model.{key}" in note for note in report.notes)


def test_a_new_head_reads_what_the_config_says() -> None:
    """So what the file's head reads isn't asked for."""
    keys = ["model.from=init", HEADS, "model.pool=gap", "model.image_size=[9,15]"]
    start = load_config(None, [f"init.from={path_of('timm_dinov3_plus')}", *keys])
    model = with_model_of_init(start).model
    assert (model.pool, model.rope, model.mlp, model.pos_embed) == ("gap", "axial", "swiglu", "none")


def test_positions_are_patch_numbers_at_any_size() -> None:
    """RoPE-ViT's; with `model.from: init` as well as without."""
    external = read_weights(path_of("timm_axial"))
    assert infer_config(external, "x", [HEADS, "model.image_size=[12,9]"]).model.rope_grid == (4, 3)
    assert infer_config(external, "x", [HEADS, "model.image_size=[12,9]", "model.rope_grid=[3,3]"]).model.rope_grid == (
        3,
        3,
    )
    start = load_config(
        None, [f"init.from={path_of('timm_axial')}", "model.from=init", HEADS, "model.image_size=[6,9]"]
    )
    assert with_model_of_init(start).model.rope_grid == (2, 3)


def test_the_authors_names_of_deit_iii(tmp_path: Path) -> None:
    """They are those of RoPE-ViT with a position embedding; without rotary positions the logits are DeiT III's."""
    path = save_changed(
        tmp_path / "deit3.safetensors",
        lambda arrays: {re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): array for name, array in arrays.items()},
        "timm_deit3",
    )
    external = read_weights(path)
    model = infer_config(external, "deit3", ["model.num_heads=4", "model.rope=none"]).model
    assert model == read_with_model("timm_deit3")[1]
    built = VisionTransformer(model)
    init_from(built, model, external, "deit3", KEEP)
    images, expected = reference_logits("timm_deit3")
    logits = model_logits(built, paddle.to_tensor(images))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_what_is_assumed_is_noted() -> None:
    """A base that no buffer determines is that of the published models."""
    for case, expected in (
        ("timm_dinov3", {"rope_base=null: no array determines it; the published models have 100, the default"}),
        ("dinov3", set()),
        ("eva02", set()),
        ("timm_eva", set()),
        (
            "timm_eva02_small",
            {
                "rope_base=10000.0: no array determines it; the published models have 10000",
                "rope_grid=[16,16]: no array determines it; the published models have [16,16]",
            },
        ),
        ("rope_vit5", set()),
    ):
        external, model, *_ = read(case)
        notes = convert_state(external, model, case, KEEP, grid_of_file(case))[1].notes
        assert set(notes) == {f"model.{note}" for note in expected}, case
    external, model, *_ = read("hf_dinov3")
    assert not convert_state(external, model, "x", KEEP, (3, 5))[1].notes  # config.json has it


def test_a_config_that_contradicts_the_file_is_told_so() -> None:
    external, model, *_ = read("timm_eva02")
    for changed, note in (
        ({"rope": "none", "rope_base": None, "rope_grid": None}, "model.rope=axial, and this model none"),
        ({"rope_base": 100.0}, "model.rope_base=10000.0, and this model 100.0"),
        ({"rope_grid": (3, 5)}, "model.rope_grid=[16,16], and this model [3,5]"),
    ):
        other = model.model_copy(update=changed)
        notes = convert_state(external, other, "x", KEEP, (3, 5))[1].notes
        assert sum(note in line for line in notes) == 1
    with pytest.raises(WeightsError, match=r"-o model\.mlp=swiglu"):
        convert_state(external, model.model_copy(update={"mlp": "gelu"}), "x", KEEP, (3, 5))


# Constants and masks


def changed_file(tmp_path: Path, case: str, **changed: np.ndarray) -> Path:
    arrays = {
        key: np.frombuffer(entry["data"], "<f4").reshape(entry["shape"])
        for key, entry in safetensors_entries(path_of(case)).items()
    }
    save_file(arrays | changed, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize("base", [100.0, 31.5])
def test_the_base_of_periods(tmp_path: Path, base: float) -> None:
    """Of DINOv3's buffer, also as bfloat16 rounds it: base ** (4 i / d)."""
    exponents = np.arange(2) / 2
    path = changed_file(tmp_path, "dinov3", **{"rope_embed.periods": (base**exponents).astype(np.float32)})
    assert infer_config(read_weights(path), "x", [], (9, 9)).model.rope_base == (None if base == 100.0 else base)
    rounded = (np.array(base**exponents, np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    path = changed_file(tmp_path, "dinov3", **{"rope_embed.periods": rounded})
    assert read_weights(path).model_hints["rope_base"] == pytest.approx(base, rel=0.02)


@pytest.mark.parametrize(
    ("case", "name", "value", "reason"),
    [
        ("dinov3", "rope_embed.periods", np.array([0.5, 0.25], np.float32), "no base gives them"),
        ("dinov3", "rope_embed.periods", np.ones(3, np.float32), "doesn't fit a width of 16"),
        ("dinov3", "blocks.0.attn.qkv.bias_mask", np.ones(48, np.float32), "masks other biases than those of keys"),
        ("dinov3", "blocks.0.attn.qkv.bias_mask", np.ones(47, np.float32), "fits no blocks.0.attn.qkv.bias"),
        ("eva02", "rope.freqs_cos", np.ones((9, 8), np.float32), "no base gives them"),
        ("eva02", "rope.freqs_cos", np.ones((8, 8), np.float32), "doesn't fit a width of 16"),
        ("timm_eva02", "blocks.0.attn.k_bias", np.ones(16, np.float32), "EVA's keys have no bias"),
        ("timm_mixed_ape", "rope.freqs", np.ones((2, 2), np.float32), "doesn't fit frequencies"),
    ],
)
def test_constants_of_other_models_are_refused(
    tmp_path: Path, case: str, name: str, value: np.ndarray, reason: str
) -> None:
    with pytest.raises(WeightsError, match=reason) as error:
        read_weights(changed_file(tmp_path, case, **{name: value}))
    assert name in str(error.value) and str(tmp_path) in str(error.value)


def test_masked_biases_and_arrays_of_pretraining_are_dropped_with_a_reason() -> None:
    dropped = read_weights(path_of("dinov3_plus")).dropped
    assert dropped.keys() == {
        *("mask_token", "rope_embed.periods", "blocks.0.attn.qkv.bias_mask"),
        *("local_cls_norm.weight", "local_cls_norm.bias"),
    }


# Orders of channels


def test_orders_of_channels() -> None:
    """Pairs (0, 4), (1, 5) of the row and (2, 6), (3, 7) of the column are neighbours in the other orders."""
    assert channel_order("halves", 8).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert channel_order("interleaved", 8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert channel_order("interleaved_columns_first", 8).tolist() == [2, 6, 3, 7, 0, 4, 1, 5]


def test_only_queries_and_keys_of_blocks_are_permuted() -> None:
    rng = np.random.default_rng(0)
    names = ("qkv.weight", "qkv.bias", "q.bias", "v.bias", "q_norm.weight", "proj.weight")
    shapes = ((16, 48), (48,), (16,), (16,), (8,), (16, 16))
    state = {f"blocks.3.attn.{name}": rng.random(shape) for name, shape in zip(names, shapes, strict=True)}
    state |= {"attn_pool.attn.qkv.weight": rng.random((16, 48)), "blocks.3.attn.rope.frequencies": rng.random((2, 8))}
    theirs = to_rope_order(state, "interleaved", 2)
    changed = {name for name in state if not np.array_equal(theirs[name], state[name])}
    assert changed == {f"blocks.3.attn.{name}" for name in ("qkv.weight", "qkv.bias", "q.bias", "q_norm.weight")}
    query, key, value = np.split(theirs["blocks.3.attn.qkv.weight"], 3, axis=1)
    ours = np.split(state["blocks.3.attn.qkv.weight"], 3, axis=1)
    np.testing.assert_array_equal(query[:, 8 + 1], ours[0][:, 8 + 4])  # the second head's second channel
    np.testing.assert_array_equal(key[:, 2], ours[1][:, 1])
    np.testing.assert_array_equal(value, ours[2])
    back = from_rope_order(theirs, "interleaved", 2)
    assert all(np.array_equal(back[name], state[name]) for name in state)


def test_a_file_that_would_be_read_in_another_order_is_not_written(tmp_path: Path) -> None:
    """Rotary positions of the row first, in a model whose arrays have the names of RoPE-ViT's, of the column first."""
    external, model, *_ = read("timm_reg1_gap")
    changed = {"register_tokens": 0, "class_token": True, "qkv_bias": "qv"}
    state = {name: array for name, array in external.state.items() if name != "reg_token"}
    state["cls_token"] = np.zeros((1, 1, 16), np.float32)
    with pytest.raises(WeightsError, match="--format plsc"):
        write_converted(state, model.model_copy(update=changed), tmp_path / "x.safetensors", "timm")


# This program's files without a record


@pytest.mark.parametrize("case", OURS)
def test_bare_files_of_this_program_come_back(tmp_path: Path, case: str) -> None:
    """With the keys that no array determines, whatever the options of the model."""
    rng = np.random.default_rng(0)
    state = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in OURS[case]["shapes"].items()}
    write_pdparams(state, tmp_path / "bare.pdparams")
    external = read_weights(tmp_path / "bare.pdparams")
    keys = {"num_heads": COMMON["num_heads"], "image_size": IMAGE_SIZE, **OURS[case]["keys"]}
    model = infer_config(external, case, [f"model.{key}={format_override(value)}" for key, value in keys.items()]).model
    back, _ = convert_state(external, model, case, KEEP, (3, 4))
    assert back.keys() == state.keys() and all(np.array_equal(back[name], state[name]) for name in state)
    assert not external.dropped and not external.undetermined
    assert all(getattr(model, key) == value for key, value in keys.items() if key != "layer_scale_init")
