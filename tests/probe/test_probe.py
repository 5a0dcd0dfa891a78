"""The verb `probe`: a run, an export and the cache."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.exported import Exported, exported  # noqa: F401
from helpers.forked_verbs import run_verb

from vit_static.__main__ import main
from vit_static.data.open_set import open_set
from vit_static.probe.features import cached_features, from_checkpoint


def test_a_run_and_its_export_are_probed(exported: Exported, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    """Both compute the same features; the second time they come from the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    results = {}
    data = ["-o", f"data.root={exported.digits}"]
    for name, source in {
        "run": ["--checkpoint", exported.run],
        "again": ["--checkpoint", exported.run, "--only", "knn"],
        "export": ["--model", exported.folder, *data, "--only", "knn", "--only", "fewshot"],
    }.items():
        done = run_verb("probe", *source, "--json", f"{name}.json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        results[name] = json.loads((tmp_path / f"{name}.json").read_text())
        assert ("from the cache" in done.stdout) == (name == "again") == results[name]["is_cached"]
        assert "k-NN" in done.stdout and ("logistic regression" in done.stdout) == (name == "run")
    run = results["run"]
    assert set(run["knn"]) == {"10", "20", "100"} or set(run["knn"]) == {"10", "20", "100", "200"}
    assert run["knn"] == results["again"]["knn"] == pytest.approx(results["export"]["knn"], abs=2.0)
    assert 20.0 < run["logistic"]["top1"] <= 100.0 and set(run["fewshot"]) >= {"1", "5"}
    assert "logistic" not in results["export"]


def test_the_cache_follows_the_weights_and_the_images(exported: Exported, tmp_path: Path, monkeypatch, capfd) -> None:  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = tmp_path / "digits"
    for path in exported.validation_images()[:12]:
        target = root / "val" / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())

    def features(*overrides: str, which: str = "last") -> tuple[np.ndarray, bool]:
        keys = [f"data.root={root}", *overrides]
        extractor, config = from_checkpoint(None, exported.run, keys, ema=False, which=which)
        num_classes = len(list((root / "val").iterdir()))
        samples, is_cached = cached_features(extractor, open_set(config.data, "val", num_classes), refresh=False)
        return samples.features, is_cached

    first, is_cached = features()
    again, is_cached_again = features()
    assert not is_cached and is_cached_again and np.array_equal(first, again) and np.isfinite(first).all()
    assert not features("data.mean=[0.4,0.5,0.5]")[1]
    (cached,) = {
        path
        for path in (tmp_path / "vit_static/features").iterdir()
        if np.array_equal(np.load(path)["features"], first)
    }
    cached.write_bytes(b"PK damaged")
    assert not features()[1] and "is damaged" in capfd.readouterr().err
    np.savez(cached, features=first, format=np.array(2))
    newer = cached.read_bytes()
    assert not features()[1] and "was written by a newer version (format 2)" in capfd.readouterr().err
    assert cached.read_bytes() == newer
    changed = next((root / "val").glob("*/*"))
    changed.write_bytes(exported.validation_images()[-1].read_bytes() + b"\0")
    assert not features()[1]


def test_mistakes_are_named(exported: Exported, tmp_path: Path, capfd) -> None:  # noqa: F811
    lines = [f"val/{path.parent.name}/{path.name}\t1,2" for path in exported.validation_images()[:3]]
    (tmp_path / "several.txt").write_text("\n".join(lines) + "\n")
    for arguments, message in (
        (["--model", exported.folder, "--ema"], "--ema needs --checkpoint"),
        (["--checkpoint", exported.run, "-o", "data.root=nowhere"], "nowhere"),
        (["--checkpoint", exported.run, "-o", f"data.val={tmp_path / 'several.txt'}"], "several labels"),
        (["--only", "svm", "--model", "x"], "--only"),
        ([], "--model"),
    ):
        capfd.readouterr()
        assert main(["probe", *map(str, arguments)]) == 2
        error = capfd.readouterr().err
        assert message in error and error.count("\n") == 1, error
