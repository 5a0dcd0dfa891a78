"""The benchmarks: interleaved rounds, ratios, output. Speeds are not tested."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from helpers.forked_verbs import run_verb
from helpers.sets import photo
from helpers.small import ROOT
from helpers.tiny import TINY_MODEL
from PIL import Image

from vit_static.__main__ import main
from vit_static.bench import data, data_scale, infer
from vit_static.bench.harness import (
    PEERS,
    Candidate,
    Result,
    config_spec,
    measure_interleaved,
    print_table,
    ratio,
    worker_command,
    write_results,
)
from vit_static.bench.train_gpu import PLSC_IMAGES_PER_S, micro_batch_overrides
from vit_static.common.errors import UserError
from vit_static.config.loader import load_config
from vit_static.config.schema import Config
from vit_static.data.open_set import open_set
from vit_static.model.variants import num_parameters

TINY = {
    **{f"model.{key}": value for key, value in TINY_MODEL.items()},
    "model.image_size": 32,
    "data.global_batch_size": 8,
}
OVERRIDES = [argument for key, value in TINY.items() for argument in ("-o", f"{key}={value}")]


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `bench ...` on a tiny model."""
    return run_verb("bench", *arguments, *OVERRIDES, cwd=ROOT)


def python_candidate(name: str, program: str) -> Candidate:
    """Return a candidate that runs a few lines of Python, and can import protocol.py like the peers."""
    return Candidate(name, f"the {name} one", (sys.executable, "-c", program), {"PYTHONPATH": str(PEERS)})


def fixed_speed(images_per_s: int) -> str:
    """Return a program that reports this speed, after a line that a library might print."""
    return f"""
import json, sys
print("a library prints something")
print(json.dumps({{"ready": True, "version": "1.0"}}), flush=True)
for line in sys.stdin:
    print(json.dumps({{"num_images": {images_per_s} * 2, "seconds": 2.0}}), flush=True)
print(json.dumps({{"peak_bytes": 1000}}), flush=True)
"""


def test_candidates_are_measured_in_interleaved_rounds(capfd: pytest.CaptureFixture[str]) -> None:
    candidates = [python_candidate("slow", fixed_speed(3)), python_candidate("fast", fixed_speed(6))]
    results = measure_interleaved(candidates, num_rounds=3, seconds=0.1)
    assert results["slow"].images_per_s == [3.0] * 3 and results["fast"].images_per_s == [6.0] * 3
    assert (results["fast"].version, results["fast"].peak_bytes) == ("1.0", 1000)
    assert ratio(results["fast"], results["slow"]) == 2.0
    titles = re.findall(r"round \d  the (\w+) one", capfd.readouterr().out)
    assert titles == ["slow", "fast"] * 3


def test_a_candidate_works_at_least_as_long_as_requested() -> None:
    program = "import protocol; protocol.serve(lambda: 1, version='7')"
    result = measure_interleaved([python_candidate("real", program)], num_rounds=2, seconds=0.05)["real"]
    assert result.version == "7" and len(result.images_per_s) == 2
    assert result.call_seconds and result.latency_ms(50) < 1.0
    assert 1e6 < result.peak_bytes < 1e9


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit('no such kernel')",
        "import protocol, sys\nprotocol.serve(lambda: sys.exit('no such kernel'))",
    ],
    ids=["before it is ready", "while it works"],
)
def test_the_error_of_a_failed_candidate_is_shown(program: str) -> None:
    candidates = [python_candidate("good", fixed_speed(1)), python_candidate("failing", program)]
    with pytest.raises(RuntimeError, match=r"(?s)the failing one.*no such kernel"):
        measure_interleaved(candidates, num_rounds=1, seconds=0.1)


def test_a_ratio_is_the_median_of_the_rounds(tmp_path: Path) -> None:
    """It isn't the ratio of the medians, 20 / 10: only measurements of the same round are compared."""
    ours, theirs = Result("ours", "", [10.0, 20.0, 60.0]), Result("theirs", "", [2.0, 40.0, 10.0])
    assert ratio(ours, theirs) == 5.0
    write_results(tmp_path / "results.json", {"a_vs_b": 5.0}, {"ours": ours}, {"data_wait": 0.25})
    written = json.loads((tmp_path / "results.json").read_text())
    assert (written["ratios"], written["data_wait"]) == ({"a_vs_b": 5.0}, 0.25)
    assert written["candidates"]["ours"]["median_images_per_s"] == 20.0


def test_inference_is_compared_with_the_best_peer() -> None:
    speeds = {
        "ours_fp32_batch_1": 8.0, "pytorch_fp32_batch_1": 4.0, "onnxruntime_fp32_batch_1": 10.0,
        "ours_fp32_batch_8": 30.0, "pytorch_fp32_batch_8": 20.0, "onnxruntime_fp32_batch_8": 10.0,
        "ours_bf16_batch_1": 16.0, "pytorch_bf16_batch_1": 4.0, "ours_int8_batch_1": 20.0,
        "ours_bf16_batch_8": 36.0, "pytorch_bf16_batch_8": 40.0, "ours_int8_batch_8": 30.0,
    }  # fmt: skip
    results = {name: Result(name, "", [speed]) for name, speed in speeds.items()}
    assert infer.ratios_of(results, (1, 8)) == pytest.approx(
        {
            "fp32_vs_best_fp32_peer": 0.8,
            "best_low_vs_best_fp32_peer": 1.8,
            "fp32_vs_best_fp32_peer_batch_1": 0.8,
            "fp32_vs_best_fp32_peer_batch_8": 1.5,
            "bf16_vs_best_fp32_peer_batch_1": 1.6,
            "bf16_vs_best_fp32_peer_batch_8": 1.8,
            "int8_vs_best_fp32_peer_batch_1": 2.0,
            "int8_vs_best_fp32_peer_batch_8": 1.5,
            "bf16_vs_best_bf16_peer_batch_1": 4.0,
            "bf16_vs_best_bf16_peer_batch_8": 0.9,
        }
    )
    only_fp32 = {name: result for name, result in results.items() if "fp32" in name}
    assert set(infer.ratios_of(only_fp32, (8,))) == {"fp32_vs_best_fp32_peer", "fp32_vs_best_fp32_peer_batch_8"}


def test_a_peer_with_other_weights_is_refused() -> None:
    logits_by_name = {
        "ours_fp32_batch_1": [[1.0, 20.0]],
        "pytorch_fp32_batch_1": [[1.001, 20.1]],
        "ours_bf16_batch_1": [[9.0]],
    }
    group = {name: Result(name, ready_info={"logits": logits}) for name, logits in logits_by_name.items()}
    infer.check_weights(group)
    group["onnxruntime_fp32_batch_1"] = Result("other", ready_info={"logits": [[1.0, 19.0]]})
    with pytest.raises(UserError, match="the logits of onnxruntime_fp32_batch_1 differ from ours"):
        infer.check_weights(group)


def test_latencies_are_percentiles_of_single_calls(capsys: pytest.CaptureFixture[str]) -> None:
    result = Result("ours", "", [10.0], call_seconds=[0.1] * 98 + [0.3, 0.5])
    assert (result.latency_ms(50), result.latency_ms(99)) == pytest.approx((100.0, 302.0))
    print_table({"ours": result}, 1, latencies=True)
    assert "100.0 ms  302.0 ms" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["train", "data", "infer", "profile"])
def test_an_output_file_in_a_missing_folder_is_refused_before_anything_is_measured(verb: str, tmp_path: Path) -> None:
    done = bench(verb, "--json", tmp_path / "nowhere" / "results.json")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "there is no folder" in done.stderr
    assert "round" not in done.stdout


def test_a_named_folder_of_images_must_exist(tmp_path: Path) -> None:
    done = bench("data", "-o", f"data.root={tmp_path / 'nowhere'}")
    assert done.returncode == 2 and "no such folder" in done.stderr


def test_the_shares_of_the_profile_add_up(tmp_path: Path) -> None:
    done = bench("profile", "--steps", 2, "--json", tmp_path / "profile.json")
    assert done.returncode == 0, done.stderr
    shares = [float(share) for share in re.findall(r" ([-\d.]+)%$", done.stdout.split("neither")[0], re.MULTILINE)]
    assert sum(shares) == pytest.approx(100.0, abs=2.0)  # each is rounded
    written = json.loads((tmp_path / "profile.json").read_text())
    assert any(name.startswith("matmul") for name in written["operators"])
    assert 0.0 < written["neither_product_nor_attention"] < 1.0
    speeds = re.search(r"the update: ([\d.]+) GB/s; a copy of as many bytes: ([\d.]+) GB/s", done.stdout)
    assert speeds is not None
    expected = written["update_gb_per_s"], written["copy_gb_per_s"]
    assert [float(speed) for speed in speeds.groups()] == pytest.approx(expected, abs=0.06)
    config = load_config(ROOT / "configs" / "bench_s16.yaml", [f"{key}={value}" for key, value in TINY.items()])
    num_bytes = expected[0] * 1e9 * written["operators"]["adamw"]["seconds"]
    assert num_bytes == pytest.approx(28 * num_parameters(config.model))  # 7 numbers per parameter


def test_the_step_has_adapters_and_the_largest_images() -> None:
    options = ["-o", "lora.rank=2", "-o", "init.from=nowhere", "-o", "train.image_sizes=[[64, 0.5], [32, 1.0]]"]
    done = bench("step", "--seconds", 0.1, *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["image_size"] == [64, 64]
    done = bench("profile", "--steps", 1, *options)
    assert done.returncode == 0, done.stderr
    assert ", 64 px (the largest of train.image_sizes), batch 8" in done.stdout


def test_the_step_worker_follows_the_protocol() -> None:
    config = load_config(ROOT / "configs" / "quickstart.yaml", [f"{key}={value}" for key, value in TINY.items()])
    done = subprocess.run(
        worker_command("step", config_spec(config)),
        cwd=ROOT,
        input="0.1\n0.2\n",
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ready, first, second, end = (json.loads(line) for line in done.stdout.splitlines())
    assert ready["ready"] and end["peak_bytes"] > 1e6
    for reply, seconds in ((first, 0.1), (second, 0.2)):
        assert reply["num_images"] % 8 == 0 and reply["num_images"] > 0 and reply["seconds"] >= seconds


@pytest.fixture
def pil_data() -> Iterator[Any]:
    """The script of the peer, which imports the other files of its folder as scripts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PEERS))
        yield importlib.import_module("pil_data")
        for name in ("pil_data", "protocol"):
            patch.delitem(sys.modules, name)


def test_pil_crops_like_torchvision(pil_data: Any) -> None:
    """A square of up to half of the area always fits, so the share of the area and the position are uniform."""
    rng = np.random.default_rng(0)
    boxes = np.array([pil_data.random_crop(400, 300, (0.1, 0.5), (1.0, 1.0), rng) for _ in range(4000)])
    left, upper, right, lower = boxes.T
    side = right - left
    assert (side == lower - upper).all() and (boxes >= 0).all() and right.max() <= 400 and lower.max() <= 300
    shares = side**2 / (400 * 300)
    assert abs(shares.min() - 0.1) < 0.005 and abs(shares.max() - 0.5) < 0.005
    deviation = 0.4 / np.sqrt(12 * 4000)  # standard deviation of the mean of 4,000 uniform shares
    assert abs(shares.mean() - 0.3) < 4 * deviation
    assert abs(np.mean(left / (400 - side)) - 0.5) < 4 / np.sqrt(12 * 4000)
    wide = np.array([pil_data.random_crop(500, 375, (0.08, 1.0), (3 / 4, 4 / 3), rng) for _ in range(1000)])
    aspects = (wide[:, 2] - wide[:, 0]) / (wide[:, 3] - wide[:, 1])
    assert 0.73 < aspects.min() < 0.78 and 1.30 < aspects.max() < 1.36


def test_pil_falls_back_to_a_centred_crop(pil_data: Any) -> None:
    """No square covers the total area of a rectangle."""
    rng = np.random.default_rng(0)
    assert pil_data.random_crop(400, 300, (1.0, 1.0), (1.0, 1.0), rng) == (50, 0, 350, 300)
    assert pil_data.random_crop(300, 400, (1.0, 1.0), (1.0, 1.0), rng) == (0, 50, 300, 350)


def test_pil_normalises_to_channels_first(pil_data: Any, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), (255, 51, 0)).save(tmp_path / "plain.png")
    spec = {
        "image_size": (8, 12),
        "crop_scale": (0.08, 1.0),
        "crop_aspect_ratio": (0.75, 1.33),
        "interpolation": "bicubic",
        "flip_probability": 0.5,
        "mean": (0.5, 0.2, 0.0),
        "std": (0.5, 0.25, 1.0),
    }
    out = np.empty((3, 8, 12), np.float32)
    pil_data.load(str(tmp_path / "plain.png"), spec, np.random.default_rng(0), out)
    np.testing.assert_allclose(out, np.broadcast_to([[[1.0]], [[0.0]], [[0.0]]], out.shape), atol=1e-6)


def test_every_gpu_gets_the_micro_batch_of_plscs_configs() -> None:
    """4,096 images in 2 micro-batches on 8 GPUs are 256 per GPU, so 3 GPUs get 768."""
    assert micro_batch_overrides("ViT_base_patch16_224_in1k_1n8c_dp_fp16o2.yaml", 3) == [
        "data.global_batch_size=768",
        "parallel.grad_accum_steps=1",
    ]
    for name in PLSC_IMAGES_PER_S:
        load_config(ROOT / "configs" / name, micro_batch_overrides(name, 1))


@pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="a GPU may be present")
def test_the_gpu_train_benchmark_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", "--device", "gpu", "-v"]) == 2
    assert "finds no GPU" in capsys.readouterr().err


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder of sixteen training images of two classes."""
    for number in range(16):
        folder = tmp_path / "train" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        photo(50, 60, seed=number).save(folder / f"{number}.jpeg")
    return tmp_path


def data_config(root: Path) -> Config:
    overrides = [f"data.root={root}", "data.global_batch_size=4", "model.image_size=32", "model.num_classes=2"]
    return load_config(ROOT / "configs" / "bench_s16.yaml", overrides)


def test_every_stage_and_every_source_is_measured(photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = data.with_augmentation(data_config(photographs))
    assert config.augment.policy == "randaugment"
    images = open_set(config.data, "train", 2)
    stages = {1: data.measure_stages(config, images, 1, num_rounds=1, seconds=0.02)}
    assert list(stages[1]) == ["read", "decode", "resize", "augment", "normalise"]
    assert min(stages[1].values()) > 0
    data.print_stages(stages, config)
    sources = data.measure_sources(config, photographs, num_rounds=1, seconds=0.02)
    assert list(sources) == ["class folders", "list file", "shards"] and min(sources.values()) > 0
    output = capsys.readouterr().out
    assert all(name in output for name in (*stages[1], *sources))


def test_the_cost_of_a_long_list_is_measured(photographs: Path) -> None:
    data_scale.write_list(photographs, 5000)
    lines = (photographs / "list.txt").read_text().splitlines()
    assert len(lines) == 5000 and all((photographs / line.rsplit(" ", 1)[0]).is_file() for line in lines[:50])
    assert 36 <= len(lines[0].rsplit(" ", 1)[0]) <= 38
    cost = data_scale.measure(photographs, 5000, data_config(photographs), time.time())
    assert cost.list_bytes == (photographs / "list.txt").stat().st_size
    assert 50 < cost.position_bytes < 300
    assert min(cost.list_s, cost.first_batch_s, cost.shuffle_s, cost.resume_s) > 0


def test_the_gpu_data_benchmark_needs_a_gpu_but_not_paddle() -> None:
    """So it also runs on machines whose GPU isn't supported by Paddle's build."""
    script = (
        "import sys; sys.modules['paddle'] = None; from vit_static.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "bench", "data", "--device", "gpu", "--seconds", "0.1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        assert "all mean differences are within" in done.stdout
    else:
        assert done.returncode == 2 and "not run" in done.stderr, done.stderr
