"""The record of passes: which keys it depends on, and the line with which a run on GPUs starts without one."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.doctor import fake_nvidia_smi, gpu_row, make_subject

from vit_static import verbs
from vit_static.common.io import cache_dir
from vit_static.config.loader import load_config
from vit_static.config.schema import Config
from vit_static.doctor import record
from vit_static.doctor.gpus import visible_gpus
from vit_static.parallel import mesh

RELEVANT = (
    "model.width=48",
    "model.dropout=0.1",
    "data.global_batch_size=16",
    "augment.policy=randaugment",
    "loss.name=sigmoid",
    "optim.name=lion",
    "optim.ema_decay=0.9",
    "parallel.sharding_stage=1",
    "amp.level=O0",
    "kernels.flash_attention=false",
    "train.freeze=backbone",
    "export.precision=int8",
)
IRRELEVANT = (
    *("name=other", "output_dir=elsewhere", "seed=3", "device=cpu", "schedule.warmup_steps=5", "train.epochs=2"),
    *("data.root=elsewhere", "data.num_threads=1", "log.every_steps=3", "checkpoint.keep_last=5", "optim.lr=1e-4"),
    *("eval.every_epochs=2", "init.from=weights.npz"),
)


def config_of(tmp_path: Path, *overrides: str) -> Config:
    return make_subject(tmp_path, *overrides).config


def test_a_pass_is_for_the_keys_that_the_checks_depend_on(tmp_path: Path) -> None:
    expected = record.fingerprint(config_of(tmp_path))
    others = [record.fingerprint(config_of(tmp_path, override)) for override in RELEVANT]
    assert len({expected, *others}) == 1 + len(RELEVANT)
    assert {record.fingerprint(config_of(tmp_path, override)) for override in IRRELEVANT} == {expected}


@pytest.fixture
def gpu_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs, as far as nvidia-smi and `choose_device` tell, and an empty cache."""
    environ = fake_nvidia_smi(tmp_path, [gpu_row(0), gpu_row(1)])
    monkeypatch.setenv("PATH", environ["PATH"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(mesh, "choose_device", lambda device: "cpu" if device == "cpu" else "gpu")


def pass_doctor(config: Config, world_size: int = 1) -> None:
    record.write_pass(record.setting(config, world_size, visible_gpus({})), config.name)


@pytest.mark.usefixtures("gpu_machine")
def test_training_on_gpus_says_so_until_the_doctor_has_passed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path)

    def notice(config: Config = config) -> str:
        verbs._recommend_doctor(config)
        return capsys.readouterr().err

    assert notice().splitlines() == [
        "vit_static: these GPUs haven't passed './run.sh doctor' with this config, driver and version of Paddle; "
        "run it first"
    ]
    pass_doctor(config)
    assert notice() == ""
    assert notice(config_of(tmp_path, "train.epochs=5")) == ""
    assert notice(config_of(tmp_path, "model.width=48")) != ""
    assert notice(config_of(tmp_path, "device=cpu", "model.width=48")) == ""


@pytest.mark.usefixtures("gpu_machine")
def test_a_pass_is_for_these_gpus_this_driver_and_number_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path)
    pass_doctor(config)
    assert record.notice(config, {}) is None
    assert record.notice(config, {"PADDLE_TRAINERS_NUM": "2"}) is not None
    assert record.notice(config, {"CUDA_VISIBLE_DEVICES": "1"}) is not None
    fake_nvidia_smi(tmp_path, [gpu_row(0, driver="570.1.1"), gpu_row(1, driver="570.1.1")])
    assert record.notice(config, {}) is not None
    fake_nvidia_smi(tmp_path, [gpu_row(0), gpu_row(1)])
    assert record.notice(config, {}) is None
    monkeypatch.setattr(record, "paddle_version", lambda: "paddlepaddle-gpu 3.4.0")
    assert record.notice(config, {}) is not None


@pytest.mark.usefixtures("gpu_machine")
def test_only_rank_0_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PADDLE_TRAINER_ID", "1")
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    verbs._recommend_doctor(config_of(tmp_path))
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("gpu_machine")
@pytest.mark.parametrize("content", [b"", b"[", b"{}", b"[3]", b"\xff"])
def test_a_damaged_record_counts_as_no_pass_and_is_replaced(tmp_path: Path, content: bytes) -> None:
    config = config_of(tmp_path)
    path = tmp_path / "cache/vit_static/doctor.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert record.notice(config, {}) is not None
    pass_doctor(config)
    assert record.notice(config, {}) is None


def test_the_record_is_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir({}) == tmp_path / ".cache/vit_static"
    assert cache_dir({"XDG_CACHE_HOME": "relative"}) == tmp_path / ".cache/vit_static"
    assert cache_dir({"XDG_CACHE_HOME": "/elsewhere"}) == Path("/elsewhere/vit_static")


def test_every_config_of_the_repository_has_a_fingerprint_of_its_own() -> None:
    from vit_static.config.loader import CONFIGS

    paths = sorted(CONFIGS.glob("*.yaml"))
    fingerprints = {record.fingerprint(load_config(path)) for path in paths}
    assert len(fingerprints) > 0.8 * len(paths)  # some differ in their data or weights alone
