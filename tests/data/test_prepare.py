"""data.prepare: the data set that a config comes with is created when it is first opened."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.forked_verbs import run_verb
from helpers.small import ROOT

from vit_static.common.errors import DataError
from vit_static.config.data_schema import DataConfig
from vit_static.config.loader import load_config
from vit_static.data import digits, prepare
from vit_static.data.open_set import open_set
from vit_static.data.prepare import prepare_set

QUICKSTART = ROOT / "configs/quickstart.yaml"
FINETUNE = ROOT / "configs/quickstart_finetune.yaml"


@pytest.mark.parametrize(("config", "num_classes"), [(QUICKSTART, 10), (FINETUNE, 2)])
def test_opening_the_quickstarts_images_creates_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: Path, num_classes: int
) -> None:
    monkeypatch.chdir(tmp_path)
    data = load_config(config).data
    assert len(open_set(data, "train", num_classes)) == 1442
    assert f"created {data.root}: 1797 images" in capsys.readouterr().err
    assert len(open_set(data, "val", num_classes)) == 355
    assert capsys.readouterr().err == ""


def test_of_several_processes_one_creates_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A lock belongs to an open file, so threads exclude each other as processes do."""
    num_calls = 0

    def counted() -> object:
        nonlocal num_calls
        num_calls += 1
        return load_source()

    load_source = digits.load_source
    monkeypatch.setattr(digits, "load_source", counted)
    data = DataConfig(root=str(tmp_path / "data/digits"), prepare="digits")
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(prepare_set, [data] * 3))
    assert num_calls == 1
    assert capsys.readouterr().err.count("created") == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["digits"]


def test_a_folder_that_exists_is_left_as_it_is(tmp_path: Path) -> None:
    prepare_set(DataConfig(root=str(tmp_path), prepare="digits"))
    assert list(tmp_path.iterdir()) == []


def test_another_root_does_not_get_the_configs_images(tmp_path: Path) -> None:
    """A misspelt folder is an error, not a new data set."""
    elsewhere = f"data.root={tmp_path}/photos"
    data = load_config(QUICKSTART, [elsewhere]).data
    assert data.prepare is None
    with pytest.raises(DataError, match=r"no such folder.*IMAGENET\.md"):
        open_set(data, "train", 10)
    assert load_config(QUICKSTART, ["data.root=data/digits"]).data.prepare == "digits"
    assert load_config(QUICKSTART, [elsewhere, "data.prepare=digits"]).data.prepare == "digits"


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/digits can't be created .*set data\.root"):
        prepare_set(DataConfig(root=str(tmp_path / "file/digits"), prepare="digits"))


def test_without_scikit_learn_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ValueError("No module named 'sklearn'; run './run.sh setup' or 'pip install scikit-learn'")

    monkeypatch.setattr(prepare, "make_digits", missing)
    with pytest.raises(DataError, match="digits: can't be created: No module named 'sklearn'"):
        prepare_set(DataConfig(root=str(tmp_path / "digits"), prepare="digits"))


REFUSED = {
    "a value": ["-o", "optim.lr=fast"],
    "a key": ["-o", "optim.lrr=1"],
    "a variant": ["-o", "model.variant=X/99"],
    "a precision": ["-o", "device=cpu", "-o", "amp.level=O2", "-o", "amp.dtype=float16"],
    "weights": ["-o", "init.from=nowhere"],
    "class weights": ["-o", "loss.class_weights=nowhere.txt"],
    "a mesh": ["-o", "parallel.mp=2"],
    "a checkpoint": ["--resume", "nowhere"],
}


@pytest.mark.slow
@pytest.mark.parametrize("arguments", REFUSED.values(), ids=REFUSED)
def test_a_refused_run_creates_nothing(tmp_path: Path, arguments: list[str]) -> None:
    done = run_verb("pretrain", "-c", QUICKSTART, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
