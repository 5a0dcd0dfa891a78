"""Files of other programs' models with rotary positions or gated MLPs: our model gives their output, at the size of the
file's images and at others, and files written back have the same bits (tests/reference/make_peer_weights_rope.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import paddle
import pytest
from helpers.small import model_logits
from helpers.weight_files import WEIGHTS, safetensors_entries

from vit_static.config.schema import InitConfig
from vit_static.model.vit import VisionTransformer
from vit_static.weights.convert import convert_state, write_converted
from vit_static.weights.formats import ExternalWeights, FormatName, read_weights
from vit_static.weights.infer import infer_config
from vit_static.weights.load import init_from
from vit_static.weights.published import published_num_heads

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


def test_published_numbers_of_heads() -> None:
    """S+ has the heads of S, and H+ has 20 where H/14 has 16."""
    assert published_num_heads(384, 12, 1536, "swiglu") == published_num_heads(384, 12, 1536, "gelu") == 6
    assert published_num_heads(1280, 32, 5120, "swiglu") == 20
    assert published_num_heads(1280, 32, 5120, "gelu") == 16
    assert published_num_heads(1280, 32, 5121, "gelu") is None
