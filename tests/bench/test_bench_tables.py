"""The tables of PERFORMANCE.md and README.md are those that bench/tables.py generates from configs/benchmarks/."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.small import ROOT

from vit_static.bench import infer, tables, train
from vit_static.bench.harness import Result, write_results

MACHINE = {"cpu": "EPYC", "instruction_sets": ["AVX2"], "cores": 2, "precisions": ["fp32"]}


def write_train_results(root: Path) -> None:
    """Write results of training as `bench train --json` does."""
    results = {
        "ours_fp32": Result("vit_static fp32", "", [2.0, 3.0, 2.5], 800_000_000),
        "pytorch_fp32": Result("PyTorch fp32", "2.14", [1.0, 2.0, 2.0], 1_000_000_000),
        "jax_fp32": Result("JAX fp32", "0.10", [0.5, 0.5, 0.5], 2_000_000_000),
    }
    ratios = train.ratios_of(results)
    others: dict[str, Any] = {
        "bench": "train",
        "model": "ViT-S/16",
        "machine": MACHINE,
        "missing": {"torch.compile": "torch"},
        "targets": {name: train.TARGETS[name] for name in ratios if name in train.TARGETS},
    }
    (root / tables.FOLDER).mkdir(parents=True)
    write_results(root / tables.FOLDER / "train_s16_avx2.json", ratios, results, others)


@pytest.mark.parametrize("page", tables.PAGES, ids=str)
def test_a_page_has_the_tables_of_the_measurements(page: Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert tables.with_tables(text, ROOT) == text, "run 'python -m vit_static.bench.tables'"
    assert "<!-- bench summary -->" in text


def test_every_file_of_measurements_is_shown_and_small() -> None:
    text = (ROOT / "configs" / "PERFORMANCE.md").read_text(encoding="utf-8")
    assert all(f"<!-- bench {name} -->" in text for name in tables.COMMANDS)
    files = list((ROOT / tables.FOLDER).glob("*"))
    assert {file.name for file in files} <= {f"{name}.json" for name in tables.COMMANDS}
    assert all(file.stat().st_size < 50_000 for file in files)


def test_a_table_shows_medians_and_ratios_of_the_same_round(tmp_path: Path) -> None:
    """The best peer is PyTorch; the ratios of the rounds are 2, 1.5 and 1.25."""
    write_train_results(tmp_path)
    lines = tables.block("train_s16_avx2", tmp_path).splitlines()
    assert lines[0].startswith("ViT-S/16 on EPYC (AVX2), 2 cores; precision: fp32: `./run.sh bench train --rounds 5")
    assert "| vit_static fp32 | 2.50 | 2.00 | 3.00 | 800 MB |" in lines
    assert "| PyTorch fp32 2.14 | 2.00 | 1.00 | 2.00 | 1000 MB |" in lines
    assert "| fp32_vs_best_peer | 1.50 | ≥ 1.12 |" in lines
    assert "| fp32_vs_jax | 5.00 |  |" in lines
    assert "| memory_vs_pytorch | 0.80 | ≤ 0.9 |" in lines
    assert lines[-1] == "torch.compile: not installed."
    assert "fp32 vs best peer 1.50, memory vs pytorch 0.80" in tables.block("summary", tmp_path)


def test_what_was_not_measured_is_not_run(tmp_path: Path) -> None:
    write_train_results(tmp_path)
    assert tables.block("infer_b16_avx512", tmp_path) == (
        "Not run: `./run.sh bench infer -o model.variant=B/16 --rounds 5 --seconds 3 "
        "--json configs/benchmarks/infer_b16_avx512.json`.\n"
    )
    with pytest.raises(ValueError, match="bench other -->: unknown table"):
        tables.with_tables("<!-- bench other -->\n<!-- end -->\n", tmp_path)


def test_the_script_rewrites_the_pages_and_nothing_else_in_them(tmp_path: Path) -> None:
    write_train_results(tmp_path)
    for page in tables.PAGES:
        shutil.copy(ROOT / page, tmp_path / page)
    assert tables.main([str(tmp_path)]) == 0
    text = (tmp_path / "configs" / "PERFORMANCE.md").read_text(encoding="utf-8")
    assert tables.block("train_s16_avx2", tmp_path) in text
    (tmp_path / tables.FOLDER / "train_s16_avx2.json").unlink()
    for source in (ROOT / tables.FOLDER).glob("*.json"):
        shutil.copy(source, tmp_path / tables.FOLDER)
    assert tables.main([str(tmp_path)]) == 0
    assert (tmp_path / "configs" / "PERFORMANCE.md").read_bytes() == (ROOT / "configs" / "PERFORMANCE.md").read_bytes()


def test_a_low_precision_without_gain_is_not_recommended() -> None:
    results = {
        "ours_fp32_batch_1": Result("", "", [10.0]),
        "ours_fp32_batch_8": Result("", "", [10.0]),
        "ours_int8_batch_1": Result("", "", [20.0]),
        "ours_int8_batch_8": Result("", "", [10.3]),
    }
    assert infer.low_precision_gains(results, (1, 8)) == {"int8": pytest.approx(1.03)}
    assert infer.advice({"int8": 1.03}) == ["int8: 1.03 times as fast as fp32: not recommended on this CPU"]
    assert infer.advice({"bf16": 1.8}) == ["bf16: 1.80 times as fast as fp32"]


def test_results_are_json_without_surprises(tmp_path: Path) -> None:
    write_train_results(tmp_path)
    values = json.loads((tmp_path / tables.FOLDER / "train_s16_avx2.json").read_text())
    assert values["machine"] == MACHINE and values["targets"] == {"fp32_vs_best_peer": 1.12, "memory_vs_pytorch": 0.9}
