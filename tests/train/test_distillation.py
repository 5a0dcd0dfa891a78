"""Runs with a teacher: what they log and save, how they resume, and what they refuse."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import metrics
from helpers.small import read_state
from helpers.tiny import tiny_model
from helpers.weight_files import WEIGHTS

from vit_static.checkpoint.folder import open_shards
from vit_static.common.errors import ConfigError, WeightsError
from vit_static.config.loader import load_config
from vit_static.config.schema import Config
from vit_static.train.trainer import train
from vit_static.weights.source import load_weights

# Another size of images, another width, another normalization than the teacher's.
STUDENT = (
    tiny_model(width=24, num_heads=3, mlp_dim=48, image_size=24)
    + """
data: {global_batch_size: 16, num_threads: 1, mean: [0.4, 0.5, 0.6], std: [0.2, 0.3, 0.4]}
augment: {mixup_alpha: 0.8, cutmix_alpha: 1.0}
train: {max_steps: 4}
checkpoint: {every_steps: 2, keep_last: 100}
log: {every_steps: 1}
seed: 5
"""
)


def student(finished: Config, folder: Path, *overrides: str) -> Config:
    """Return the config of a small student of the finished run."""
    path = folder / "student.yaml"
    path.write_text(STUDENT)
    common = [f"data.root={finished.data.root}", f"output_dir={folder}", f"distill.teacher={finished.run_dir}"]
    return load_config(path, [*common, *overrides])


@pytest.mark.parametrize("kind", ["token", "features"])  # soft: with several sizes, below
def test_a_distilled_run_resumes_with_the_same_bits(finished: Config, tmp_path: Path, kind: str) -> None:
    token = f"model.distillation_token={str(kind == 'token').lower()}"
    config = student(finished, tmp_path, f"distill.kind={kind}", "optim.ema_decay=0.9", token)
    assert train(config)
    folder = config.run_dir
    lines = metrics(folder, "train")
    for line in lines:
        assert line["loss"] == pytest.approx((line["label_loss"] + line["distill_loss"]) / 2, rel=1e-6)
        assert line["distill_loss"] > 0.0
    files = ["model.pdparams", "model_ema.pdparams"]
    expected = [read_state(folder / name) for name in files]
    shards = open_shards(folder / "checkpoints" / "latest")
    has_projector = any(name.startswith("distill_projector.") for name in shards)
    assert has_projector == (kind == "features")
    assert not any("teacher" in name for name in shards)
    layers = {"cls_token", "pos_embed", "patch_embed", "blocks", "norm", "head"}
    layers |= {"dist_token", "head_dist"} if kind == "token" else set()
    assert {name.partition(".")[0] for name in expected[0]} == layers
    assert load_weights(folder / "checkpoints" / "latest").state.keys() == expected[0].keys()
    for path in [folder / "checkpoints" / "step_00000004", *(folder / name for name in files)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert train(config)
    assert [line["step"] for line in metrics(folder, "train")] == [1, 2, 3, 4, 3, 4]
    assert [line["loss"] for line in metrics(folder, "train")[4:]] == [line["loss"] for line in lines[2:]]
    for name, state in zip(files, expected, strict=True):
        again = read_state(folder / name)
        assert all(np.array_equal(again[key], state[key]) for key in state), name


def test_another_teacher_cannot_be_resumed_with(finished: Config, tmp_path: Path) -> None:
    config = student(finished, tmp_path, "train.max_steps=2")
    assert train(config)
    other = tmp_path / "other"
    shutil.copytree(finished.run_dir / "checkpoints" / "step_00000004", other)
    longer = ["train.max_steps=3", f"distill.teacher={other}"]
    with pytest.raises(ConfigError) as caught:
        train(student(finished, tmp_path, *longer))
    message = str(caught.value)
    assert re.search(r"was trained with the teacher \S+/finished\S* \(sha256 [0-9a-f]{12}\)", message)
    assert re.search(rf"distill.teacher is now the teacher {other} \(sha256 [0-9a-f]{{12}}\)", message)
    with pytest.raises(ConfigError, match=r"distill\.teacher is now no teacher: cannot resume"):
        train(student(finished, tmp_path, "train.max_steps=3", "distill.teacher=null"))
    # The same weights and config elsewhere are the same teacher.
    same = tmp_path / "same"
    shutil.copytree(finished.run_dir, same)
    assert train(student(finished, tmp_path, "train.max_steps=3", f"distill.teacher={same}"))


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["distill.teacher=nowhere"], WeightsError, "distill.teacher: nowhere: no such file or folder"),
        (["model.num_classes=11"], ConfigError, "has 10 classes, and this model 11 classes; use a teacher of the same"),
        (["parallel.pp=2"], ConfigError, "the model has only 1 block"),
        (["distill.config=nowhere"], ConfigError, "distill.config: nowhere: there is no such file"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused(
    finished: Config, tmp_path: Path, overrides: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        train(student(finished, tmp_path, *overrides))
    assert not (tmp_path / "student").exists()


def test_images_of_several_sizes_are_resampled_to_the_teachers(finished: Config, tmp_path: Path) -> None:
    """The second size has a program, and constants of the teacher, of its own."""
    config = student(finished, tmp_path, "train.image_sizes=[[24, 0.5], [32, 1.0]]", "model.image_size=32")
    assert train(config)
    losses = [line["distill_loss"] for line in metrics(config.run_dir, "train")]
    assert len(losses) == 4 and min(losses) > 0.0 and max(losses) < 10.0
    state = read_state(config.run_dir / "model.pdparams")
    shutil.rmtree(config.run_dir / "checkpoints" / "step_00000004")
    assert train(config)
    again = read_state(config.run_dir / "model.pdparams")
    assert all(np.array_equal(again[key], state[key]) for key in state)


def test_a_file_of_weights_without_a_config_can_teach(
    finished: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its arrays don't determine the number of heads, unless a config says it; nor how its images were normalized."""
    weights = WEIGHTS / "timm_deit3.safetensors"
    overrides = [f"distill.teacher={weights}", "distill.kind=features", "train.max_steps=1"]
    with pytest.raises(ConfigError, match=r"no array determines its num_heads; set distill\.config to a config"):
        train(student(finished, tmp_path, *overrides))
    model: dict[str, object] = {
        "width": 20,
        "depth": 2,
        "num_heads": 4,
        "mlp_dim": 36,
        "patch_size": 4,
        "image_size": 12,
    }
    model |= {"layer_scale_init": 1e-5, "class_token_pos_embed": False, "num_classes": 7}
    (tmp_path / "teacher.yaml").write_text(json.dumps({"model": model}))
    assert train(student(finished, tmp_path, *overrides, f"distill.config={tmp_path / 'teacher.yaml'}"))
    output = capfd.readouterr().out
    assert "features, weight 0.5; ViT for images of 12x12, 0.01 M parameters" in " ".join(output.split())
    # A file that this program wrote records its model.
    (tmp_path / "alone").mkdir()
    shutil.copy(finished.run_dir / "model.pdparams", tmp_path / "alone")
    overrides = [f"distill.teacher={tmp_path / 'alone/model.pdparams'}", "train.max_steps=1", "name=other"]
    assert train(student(finished, tmp_path, *overrides))
    output = " ".join(capfd.readouterr().out.split())
    assert "note: the teacher's file has no config beside it: its model is inferred from the arrays" in output
