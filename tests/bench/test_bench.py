"""The benchmarks' own workings: taking turns, ratios, what they print; no speed is tested here."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from helpers.small import ROOT
from helpers.tiny import TINY_MODEL
from PIL import Image

from vit_static.bench import infer
from vit_static.bench.harness import (
    PEERS,
    Contender,
    Result,
    config_spec,
    print_table,
    ratio,
    run_in_turns,
    worker_command,
    write_results,
)
from vit_static.common.errors import UserError
from vit_static.config.loader import load_config

TINY = {
    **{f"model.{key}": value for key, value in TINY_MODEL.items()},
    "model.image_size": 32,
    "data.global_batch_size": 8,
}
OVERRIDES = [argument for key, value in TINY.items() for argument in ("-o", f"{key}={value}")]


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`./run.sh bench ...` on a tiny model, in the environment of the tests."""
    return subprocess.run(
        [sys.executable, "-m", "vit_static", "bench", *map(str, arguments), *OVERRIDES],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def contender(name: str, program: str) -> Contender:
    """A process that runs a few lines of Python, and finds protocol.py as the peers do."""
    return Contender(name, f"the {name} one", (sys.executable, "-c", program), {"PYTHONPATH": str(PEERS)})


def of_speed(images_per_s: int) -> str:
    return f"""
import json, sys
print("a library says something")
print(json.dumps({{"ready": True, "version": "1.0"}}), flush=True)
for line in sys.stdin:
    print(json.dumps({{"num_images": {images_per_s} * 2, "seconds": 2.0}}), flush=True)
print(json.dumps({{"peak_bytes": 1000}}), flush=True)
"""


def test_contenders_take_turns(capfd: pytest.CaptureFixture[str]) -> None:
    results = run_in_turns([contender("slow", of_speed(3)), contender("quick", of_speed(6))], rounds=3, seconds=0.1)
    assert results["slow"].images_per_s == [3.0] * 3 and results["quick"].images_per_s == [6.0] * 3
    assert (results["quick"].version, results["quick"].peak_bytes) == ("1.0", 1000)
    assert ratio(results["quick"], results["slow"]) == 2.0
    titles = re.findall(r"round \d  the (\w+) one", capfd.readouterr().out)
    assert titles == ["slow", "quick"] * 3


def test_the_protocol_works_at_least_as_long_as_it_is_told_to() -> None:
    program = "import protocol; protocol.serve(lambda: 1, version='7')"
    result = run_in_turns([contender("real", program)], rounds=2, seconds=0.05)["real"]
    assert result.version == "7" and len(result.images_per_s) == 2
    assert result.calls and result.latency_ms(50) < 1.0
    assert 1e6 < result.peak_bytes < 1e9


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit('no such kernel')",
        "import protocol, sys\nprotocol.serve(lambda: sys.exit('no such kernel'))",
    ],
    ids=["before it is ready", "in its turn"],
)
def test_a_contender_that_fails_says_why(program: str) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)the failing one.*no such kernel"):
        run_in_turns([contender("good", of_speed(1)), contender("failing", program)], rounds=1, seconds=0.1)


def test_a_ratio_is_the_median_of_the_rounds(tmp_path: Path) -> None:
    """Not the ratio of the medians, 20 / 10: neighbours in time are compared."""
    ours, theirs = Result("ours", "", [10.0, 20.0, 60.0]), Result("theirs", "", [2.0, 40.0, 10.0])
    assert ratio(ours, theirs) == 5.0
    write_results(tmp_path / "found.json", {"a_vs_b": 5.0}, {"ours": ours}, {"data_wait": 0.25})
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["ratios"], found["data_wait"]) == ({"a_vs_b": 5.0}, 0.25)
    assert found["contenders"]["ours"]["median_images_per_s"] == 20.0


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
    only = {name: result for name, result in results.items() if "fp32" in name}
    assert set(infer.ratios_of(only, (8,))) == {"fp32_vs_best_fp32_peer", "fp32_vs_best_fp32_peer_batch_8"}


def test_a_peer_with_other_weights_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    known = {"ours_fp32_batch_1": [[1.0, 20.0]], "pytorch_fp32_batch_1": [[1.001, 20.1]], "ours_bf16_batch_1": [[9.0]]}
    group = {name: Result(name, known={"logits": logits}) for name, logits in known.items()}
    infer.check_weights(group)
    group["onnxruntime_fp32_batch_1"] = Result("other", known={"logits": [[1.0, 19.0]]})
    with pytest.raises(UserError, match="onnxruntime_fp32_batch_1 answers otherwise"):
        infer.check_weights(group)


def test_latencies_are_of_single_calls(capsys: pytest.CaptureFixture[str]) -> None:
    result = Result("ours", "", [10.0], calls=[0.1] * 98 + [0.3, 0.5])
    assert (result.latency_ms(50), result.latency_ms(99)) == pytest.approx((100.0, 302.0))
    print_table({"ours": result}, 1, latencies=True)
    assert "100.0 ms   302.0 ms" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["train", "data", "infer", "profile"])
def test_a_file_that_could_not_be_written_is_a_mistake_before_anything_is_measured(verb: str, tmp_path: Path) -> None:
    done = bench(verb, "--json", tmp_path / "nowhere" / "found.json")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "there is no folder" in done.stderr
    assert "round" not in done.stdout


def test_a_folder_of_images_that_is_named_must_be_there(tmp_path: Path) -> None:
    done = bench("data", "-o", f"data.root={tmp_path / 'nowhere'}")
    assert done.returncode == 2 and "no such folder" in done.stderr


def test_profile_prints_shares_of_a_whole(tmp_path: Path) -> None:
    done = bench("profile", "--steps", 2, "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    shares = [float(share) for share in re.findall(r" ([-\d.]+)%$", done.stdout.split("neither")[0], re.MULTILINE)]
    assert sum(shares) == pytest.approx(100.0, abs=2.0)  # each is rounded
    found = json.loads((tmp_path / "found.json").read_text())
    assert any(name.startswith("matmul") for name in found["operators"])
    assert 0.0 < found["neither_product_nor_attention"] < 1.0


def test_the_training_step_is_a_contender() -> None:
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
    for turn, seconds in ((first, 0.1), (second, 0.2)):
        assert turn["num_images"] % 8 == 0 and turn["num_images"] > 0 and turn["seconds"] >= seconds


@pytest.fixture
def pil_data() -> Iterator[Any]:
    """The peer's script, which imports its neighbours as scripts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PEERS))
        yield importlib.import_module("pil_data")
        for name in ("pil_data", "protocol"):
            patch.delitem(sys.modules, name)


def test_pil_crops_as_torchvision_does(pil_data: Any) -> None:
    """Squares of up to half of the area always fit: then the share of the area and the place are uniform."""
    rng = np.random.default_rng(0)
    boxes = np.array([pil_data.random_crop(400, 300, (0.1, 0.5), (1.0, 1.0), rng) for _ in range(4000)])
    left, upper, right, lower = boxes.T
    side = right - left
    assert (side == lower - upper).all() and (boxes >= 0).all() and right.max() <= 400 and lower.max() <= 300
    shares = side**2 / (400 * 300)
    assert abs(shares.min() - 0.1) < 0.005 and abs(shares.max() - 0.5) < 0.005
    deviation = 0.4 / np.sqrt(12 * 4000)  # of the mean of as many uniform numbers
    assert abs(shares.mean() - 0.3) < 4 * deviation
    assert abs(np.mean(left / (400 - side)) - 0.5) < 4 / np.sqrt(12 * 4000)
    wide = np.array([pil_data.random_crop(500, 375, (0.08, 1.0), (3 / 4, 4 / 3), rng) for _ in range(1000)])
    aspects = (wide[:, 2] - wide[:, 0]) / (wide[:, 3] - wide[:, 1])
    assert 0.73 < aspects.min() < 0.78 and 1.30 < aspects.max() < 1.36


def test_pil_falls_back_to_the_centre(pil_data: Any) -> None:
    """No square has the whole area of a rectangle."""
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


def test_a_card_gets_the_micro_batch_that_the_seeds_configs_give_each() -> None:
    """4,096 images in 2 parts on 8 cards are 256 each; on 4 nodes of 8 as many of the whole batch."""
    from vit_static.bench.harness import ROOT
    from vit_static.bench.train_gpu import PLSC, own_batch
    from vit_static.config.loader import load_config

    assert own_batch("ViT_base_patch16_224_in1k_1n8c_dp_fp16o2.yaml", 3) == [
        "data.global_batch_size=768",
        "parallel.grad_accum_steps=1",
    ]
    for name in PLSC:
        load_config(ROOT / "configs" / name, own_batch(name, 1))


@pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="there may be one")
def test_the_cards_benchmark_wants_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    from vit_static.__main__ import main

    assert main(["bench", "train", "--device", "gpu", "-v"]) == 2
    assert "no card" in capsys.readouterr().err


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Sixteen of two classes."""
    from helpers.sets import photo

    for number in range(16):
        folder = tmp_path / "train" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        photo(50, 60, seed=number).save(folder / f"{number}.jpeg")
    return tmp_path


def data_config(root: Path, *overrides: str) -> Any:
    from vit_static.bench.harness import ROOT
    from vit_static.config.loader import load_config

    given = [f"data.root={root}", "data.global_batch_size=4", "model.image_size=32", "model.num_classes=2", *overrides]
    return load_config(ROOT / "configs" / "bench_s16.yaml", given)


def test_every_stage_and_every_source_is_measured(photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vit_static.bench import data
    from vit_static.data.open_set import open_set

    config = data.with_a_policy(data_config(photographs))
    assert config.augment.policy == "randaugment"
    images = open_set(config.data, "train", 2)
    stages = {1: data.by_stage(config, images, 1, rounds=1, seconds=0.02)}
    assert list(stages[1]) == ["read", "decode", "resize", "augment", "normalise"]
    assert min(stages[1].values()) > 0
    data.print_stages(stages, config)
    sources = data.by_source(config, photographs, rounds=1, seconds=0.02)
    assert list(sources) == ["class folders", "list file", "shards"] and min(sources.values()) > 0
    said = capsys.readouterr().out
    assert all(name in said for name in (*stages[1], *sources))


def test_a_long_lists_costs_are_measured(photographs: Path) -> None:
    import time

    from vit_static.bench import data_scale

    data_scale.write_list(photographs, 5000)
    lines = (photographs / "list.txt").read_text().splitlines()
    assert len(lines) == 5000 and all((photographs / line.rsplit(" ", 1)[0]).is_file() for line in lines[:50])
    assert 36 <= len(lines[0].rsplit(" ", 1)[0]) <= 38
    cost = data_scale.measure(photographs, 5000, data_config(photographs), time.time())
    assert cost.list_bytes == (photographs / "list.txt").stat().st_size
    assert 50 < cost.position_bytes < 300
    assert min(cost.list_s, cost.first_batch_s, cost.shuffle_s, cost.resume_s) > 0


def test_the_cards_data_benchmark_does_without_paddle_and_wants_a_card() -> None:
    """On a machine whose card Paddle's build can't use, DALI's pipelines are compared all the same."""
    script = (
        "import sys; sys.modules['paddle'] = None; from vit_static.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "bench", "data", "--device", "gpu", "--seconds", "0.1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        assert "all within a mean of" in done.stdout
    else:
        assert done.returncode == 2 and "not run" in done.stderr, done.stderr
