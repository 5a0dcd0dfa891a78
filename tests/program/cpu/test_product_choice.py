"""MKLML's products against NumPy in float64, and the choice between them and oneDNN's: cached, shared, resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.forked_verbs import start_verb
from helpers.runs import TINY

from vit_static.checkpoint.progress import KernelRecord
from vit_static.checkpoint.resume import read_kernels
from vit_static.program.cpu import product_choice, sgemm
from vit_static.program.cpu.onednn import Layout, dense
from vit_static.program.cpu.product_choice import MKLML, ONEDNN, Choices, Product

pytestmark = pytest.mark.cpu_isa

rng = np.random.default_rng(0)
LARGE, LARGER = (128, 512, 256), (128, 512, 512)  # rows, depth, columns


@pytest.mark.parametrize("orders", ["nn", "nt", "tn", "tt"])
def test_mklml_computes_products_of_rows_and_columns(orders: str) -> None:
    """Of any order, of parts of longer rows, and with a factor; oneDNN computes the same."""
    a, b = rng.standard_normal((13, 7), np.float32), rng.standard_normal((7, 5), np.float32)
    operands, layouts = [], []
    for matrix, order in zip((a, b), orders, strict=True):
        stored = np.zeros((9 + matrix.shape[0], 20), np.float32)
        stored = stored if order == "n" else stored.T
        part = stored[: matrix.shape[0], : matrix.shape[1]]
        part[:] = matrix
        operands.append(part)
        layouts.append(Layout("float32", part.shape, tuple(stride // 4 for stride in part.strides)))
    out = np.full((13, 9), np.nan, np.float32)
    kernel = sgemm.product(*layouts, Layout("float32", (13, 5), (9, 1)), 0.5)
    assert kernel is not None
    kernel(*(operand.ctypes.data for operand in (*operands, out)))
    np.testing.assert_allclose(out[:, :5], 0.5 * (a.astype(float) @ b.astype(float)), atol=2e-6)
    assert np.isnan(out[:, 5:]).all()


def test_mklml_leaves_other_products_to_onednn() -> None:
    a, b, out = dense("float32", 4, 3), dense("float32", 3, 5), dense("float32", 4, 5)
    assert sgemm.product(a, b, out) is not None
    assert sgemm.product(dense("bfloat16", 4, 3), dense("bfloat16", 3, 5), out) is None
    assert sgemm.product(dense("float32", 2, 4, 3), dense("float32", 2, 3, 5), dense("float32", 2, 4, 5)) is None
    assert sgemm.product(Layout("float32", (4, 3), (6, 2)), b, out) is None  # every second element
    assert sgemm.product(a, b, dense("float32", 5, 4).transposed) is None
    assert MKLML not in Product(a, b, out, 1.0).kernels  # too small to be measured


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vit_static/products.json"


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Let MKLML take these seconds for a product of so many operations, and oneDNN one; others must not be measured."""
    seconds: dict[int, float] = {}
    monkeypatch.setattr(Product, "measure", lambda self: {ONEDNN: 1.0, MKLML: seconds[self.flop]})
    return seconds


def product(shape: Sequence[int] = LARGE) -> Product:
    rows, depth, columns = shape
    return Product(dense("float32", rows, depth), dense("float32", depth, columns), dense("float32", rows, columns), 1)


def settled(*products: Product, gather: Callable[[Any], list[Any]] = lambda mine: [mine]) -> Choices:
    choices = Choices()
    for each in products:
        choices.add(each)
    choices.settle(gather)
    return choices


def library_of(made: Product) -> str:
    return next(name for name, kernel in made.kernels.items() if kernel is made._run)


def test_both_libraries_are_really_measured(cache: Path) -> None:
    made = product()
    measured = made.measure()
    flops_per_s = {name: made.flop / seconds for name, seconds in measured.items()}
    assert set(measured) == {ONEDNN, MKLML} and all(1e8 < rate < 1e13 for rate in flops_per_s.values())
    assert settled(made).record() is not None and cache.is_file()


def test_the_clearly_faster_one_is_chosen_and_remembered(cache: Path, seconds: dict[int, float]) -> None:
    faster, similar = product(), product(LARGER)
    seconds.update({faster.flop: 0.8, similar.flop: 0.95})
    record = settled(faster, similar).record()
    assert (library_of(faster), library_of(similar)) == (MKLML, ONEDNN)
    assert record is not None and record.libraries == {"128x512x256 nn": MKLML, "128x512x512 nn": ONEDNN}
    seconds.clear()  # measuring would raise KeyError from now on
    again = product()
    settled(again)
    assert library_of(again) == MKLML


def test_choices_of_other_machines_and_damaged_files_are_not_used(cache: Path, seconds: dict[int, float]) -> None:
    made = product()
    seconds[made.flop] = 0.5
    settled(made)
    content = json.loads(cache.read_text())
    (machine,) = content["machines"]
    assert "oneDNN 3." in machine and machine.endswith("threads")
    seconds[made.flop] = 2.0
    for damaged in ("{", "[]", "{}", json.dumps({"format": 99, "machines": content["machines"]}), "[" * 100_000):
        cache.write_text(damaged)
        made = product()
        settled(made)
        assert library_of(made) == ONEDNN
    cache.write_text(json.dumps({"format": 1, "machines": {"another CPU": content["machines"][machine]}}))
    made = product()
    settled(made)
    assert library_of(made) == ONEDNN and len(json.loads(cache.read_text())["machines"]) == 2


def test_without_time_left_products_stay_with_onednn(
    cache: Path, seconds: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product_choice, "_BUDGET_S", 0.0)
    made = product()
    settled(made)
    assert library_of(made) == ONEDNN and not cache.exists()


def test_all_ranks_use_the_choice_of_the_first(cache: Path, seconds: dict[int, float]) -> None:
    made = product()
    seconds[made.flop] = 0.5
    choices = settled(made, gather=lambda mine: [{made.key: ONEDNN, "another rank's": MKLML}, mine])
    record = choices.record()
    assert library_of(made) == ONEDNN
    assert record is not None and record.libraries == {made.key: ONEDNN, "another rank's": MKLML}


def test_a_resumed_run_keeps_its_choices(cache: Path, seconds: dict[int, float]) -> None:
    made = product()
    seconds[made.flop] = 0.5
    record = settled(made).record()
    assert record is not None
    for machine, expected in ((record.machine, ONEDNN), ("another machine", MKLML)):
        choices, made = Choices(), product()
        choices.keep(KernelRecord(machine, {made.key: ONEDNN}))
        choices.add(made)
        choices.settle(lambda mine: [mine])
        assert library_of(made) == expected


SETTINGS = (
    *(
        "model.width=128",
        "model.num_heads=2",
        "model.depth=1",
        "model.mlp_dim=512",
        "model.patch_size=8",
        "model.pool=gap",
    ),
    *("data.global_batch_size=64", "log.every_steps=1", "checkpoint.every_steps=1", "amp.level=O0", "train.epochs=9"),
)


def train(folder: Path, digits: Path, name: str, num_steps: int) -> tuple[KernelRecord, list[float]]:
    """Train in a process of its own whose cache is in `folder`; return the last checkpoint's record, and the losses."""
    (folder / "tiny.yaml").write_text(TINY)
    settings = (*SETTINGS, f"name={name}", f"data.root={digits}", f"train.max_steps={num_steps}")
    arguments = [word for setting in settings for word in ("-o", setting)]
    output = folder / "output.txt"
    before = f"import os; os.environ['XDG_CACHE_HOME'] = {str(folder)!r}"
    verb = start_verb(["pretrain", "-c", "tiny.yaml", *arguments], folder, output, None, before)
    assert verb.wait(120) == 0, output.read_text()
    run = folder / "output" / name
    record = read_kernels(run / f"checkpoints/step_{num_steps:08d}")
    assert record is not None
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return record, [line["loss"] for line in lines if line["kind"] == "train"]


def test_checkpoints_hold_the_choices(tmp_path: Path, small_digits: Path) -> None:
    """A resumed run computes as before even if the machine's cache says otherwise by then; another run doesn't."""
    record, losses = train(tmp_path, small_digits, "first", 2)
    assert len(record.libraries) > 2
    swapped = {key: MKLML if library == ONEDNN else ONEDNN for key, library in record.libraries.items()}
    cache = {"format": 1, "machines": {record.machine: swapped}}
    (tmp_path / "vit_static/products.json").write_text(json.dumps(cache))
    resumed, _ = train(tmp_path, small_digits, "first", 3)
    assert resumed == record
    other, other_losses = train(tmp_path, small_digits, "other", 2)
    assert other.libraries == swapped
    np.testing.assert_allclose(other_losses[:2], losses, rtol=1e-5)
