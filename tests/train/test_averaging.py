"""Averages of weights: the uniform one, the greedy soup, and weights that can't be averaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import metrics
from helpers.small import read_state

from vit_static.common.errors import UserError, WeightsError
from vit_static.config.schema import Config
from vit_static.train.averaging import average_runs, greedy_soup, mean_state
from vit_static.train.evaluate import evaluate_checkpoint
from vit_static.weights.load import write_pdparams
from vit_static.weights.source import load_weights


def test_the_mean_is_numpys() -> None:
    rng = np.random.default_rng(0)
    states = [
        {name: rng.standard_normal(shape).astype(np.float32) for name, shape in (("a", (3, 4)), ("b", (5,)))}
        for _ in range(5)
    ]
    mean = mean_state(iter(states))
    for name, value in mean.items():
        expected = np.mean(np.stack([state[name] for state in states]), axis=0, dtype=np.float64)
        assert value.dtype == np.float32 and np.array_equal(value, expected.astype(np.float32))


@pytest.mark.parametrize("metric", ["top1", "loss"])
def test_a_greedy_soup_keeps_what_does_not_make_it_worse(metric: str) -> None:
    """By hand. Candidate 2 is the best; 0, the second best, improves it; 3 makes it worse; 1 leaves it as it is."""
    sign = 1.0 if metric == "top1" else -1.0
    values: dict[tuple[int, ...], float] = {(0,): 90.0, (1,): 70.0, (2,): 91.0, (3,): 80.0, (4,): np.nan}
    values |= {(2, 0): 92.0, (2, 0, 3): 91.5, (2, 0, 1): 92.0, (2, 0, 1, 4): np.nan}
    tried = []

    def evaluate(positions: Sequence[int]) -> float:
        tried.append(tuple(positions))
        return sign * values[tuple(positions)]

    soup = greedy_soup(5, evaluate, metric)
    assert (soup.chosen, soup.value) == ([2, 0, 1], sign * 92.0)
    assert list(soup.results) == [2, 0, 3, 1, 4]
    assert tried[5:] == [(2, 0), (2, 0, 3), (2, 0, 1), (2, 0, 1, 4)]


def test_a_runs_checkpoints_are_averaged_and_a_soup_of_them_is_evaluated(
    finished: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = finished.run_dir, tmp_path / "average"
    steps = {step: load_weights(run / "checkpoints" / f"step_{step:08d}").state for step in (4, 8, 11)}
    average_runs(None, [run], [], last=2, out=out)
    state = load_weights(out).state
    for name, value in state.items():
        np.testing.assert_allclose(value, np.mean([steps[8][name], steps[11][name]], axis=0), rtol=1e-6, atol=1e-9)
    assert load_weights(out).class_names == load_weights(run).class_names

    soup = tmp_path / "soup"
    average_runs(None, [run], ["eval.metric=loss"], greedy=True, out=soup)
    report = json.loads((soup / "average.json").read_text())
    losses = {each["weights"].rpartition("_")[2]: each["loss"] for each in report["candidates"]}
    assert len(losses) == 3 and list(losses.values()) == sorted(losses.values())
    for line in metrics(run, "eval"):
        assert losses[f"{line['step']:08d}"] == pytest.approx(line["loss"], rel=1e-5)
    chosen = [steps[int(path.rpartition("_")[2])] for path in report["averaged"]]
    for name, value in load_weights(soup).state.items():
        np.testing.assert_allclose(value, np.mean([each[name] for each in chosen], axis=0), rtol=1e-6, atol=1e-9)
    capsys.readouterr()
    evaluate_checkpoint(None, soup, [])
    evaluated = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert evaluated["loss"] == pytest.approx(report["value"], rel=1e-5)
    assert report["value"] <= min(losses.values())


def test_what_cannot_be_averaged_is_refused_in_one_line(finished: Config, tmp_path: Path) -> None:
    run, other = finished.run_dir, tmp_path / "other"
    other.mkdir()
    state = read_state(run / "model.pdparams")
    state["head.bias"] = np.zeros([11], np.float32)
    state["head.weight"] = np.zeros([state["head.weight"].shape[0], 11], np.float32)
    write_pdparams(state, other / "model.pdparams")
    with pytest.raises(WeightsError, match=r"head.bias has the shape \[11\], and \[10\] in .*step_00000011"):
        average_runs(None, [run, other / "model.pdparams"], [], out=tmp_path / "out")
    for name in ("config.yaml", "class_names.txt", "model.pdparams"):
        shutil.copy(run / name, other)
    (other / "config.yaml").write_text((run / "config.yaml").read_text().replace("gelu: erf", "gelu: tanh"))
    with pytest.raises(
        WeightsError, match=r"has model\.gelu = 'tanh', and .* has 'erf'; only weights of the same model"
    ):
        average_runs(None, [run, other], [], out=tmp_path / "out")
    shutil.copy(run / "config.yaml", other)
    (other / "class_names.txt").write_text("\n".join("abcdefghij"))
    with pytest.raises(WeightsError, match="has other classes than"):
        average_runs(None, [run, other], [], out=tmp_path / "out")
    with pytest.raises(UserError, match=r"--last 9: .* has 3 checkpoints; use a smaller number, or train with -o chec"):
        average_runs(None, [run], [], last=9)
    with pytest.raises(WeightsError, match="none: no such file or folder"):
        average_runs(None, [run, tmp_path / "none"], [])
    with pytest.raises(UserError, match="an average needs two"):
        average_runs(None, [other], [])
    with pytest.raises(UserError, match="is a run or a file; name another folder"):
        average_runs(None, [run], [], out=run)
    remedy = r"name a folder, such as avg, and '\./run\.sh convert --from avg --to avg\.safetensors' writes one file"
    with pytest.raises(UserError, match=remedy):
        average_runs(None, [run], [], out=Path("avg.safetensors"))
    assert not (tmp_path / "out").exists()
