"""The program as users run it, in their own folder: each verb through run.sh, and repetitions in forked processes."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import run_sh, use_test_environment  # noqa: F401 - a fixture
from helpers.forked_launch import run_forked_launch
from helpers.forked_verbs import run_verb
from helpers.small import ROOT, read_state
from PIL import Image


def test_pretrain_prints_its_progress_and_nothing_else(workplace: Path) -> None:
    """Plain lines where the output is no terminal; none of Paddle's or DALI's."""
    done = run_sh("pretrain", "-c", "tiny.yaml", "-o", "name=again", "-o", "train.max_steps=6", cwd=workplace)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "again" and lines[1].startswith("  model      ViT, 32 wide, 1 deep")
    screen = [line for line in lines[1:] if line.startswith("  ")]
    assert lines[1 : 1 + len(screen)] == screen and len(screen) < 18
    assert any(re.match(r"step 5/6  loss [\d.]+  lr .* images/s  data_wait .* left", line) for line in lines)
    assert re.match(
        r"done in .*; top-1 [\d.]+ %, the best of this run; weights in output/again/model.pdparams", lines[-1]
    )
    progress = lines[1 + len(screen) :]
    assert all(re.match(r"expected end |step |epoch |checkpoints: |done in ", line) for line in progress)


@pytest.mark.slow
def test_finetune_from_that_run_with_another_head_and_size(workplace: Path) -> None:
    done = run_sh("finetune", "-c", "finetune.yaml", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert "resampled: pos_embed; reinitialized: head.weight, head.bias" in " ".join(done.stdout.split())
    before = read_state(workplace / "output/tiny/model.pdparams")
    after = read_state(workplace / "output/finetune/model.pdparams")
    assert before["pos_embed"].shape == (1, 1 + 2 * 2, 32) and after["pos_embed"].shape == (1, 1 + 3 * 4, 32)
    assert after["head.weight"].shape == (32, 2)


@pytest.mark.slow
def test_eval_with_other_labels_other_images_and_converted_weights(workplace: Path) -> None:
    """With the same labels, ImageNet-V2 and ReaL change nothing; neither do converted weights."""
    plain = run_sh("eval", "--checkpoint", "output/tiny", "--per-class", "classes.csv", cwd=workplace)
    result = json.loads(plain.stdout.splitlines()[-1])
    classes = list(csv.DictReader((workplace / "classes.csv").open(newline="")))
    assert [row["name"] for row in classes][3:5] == ["three", "four"] and {row["support"] for row in classes} == {"3"}
    assert 100.0 * np.mean([float(row["recall"]) for row in classes]) == pytest.approx(result["balanced_accuracy"])
    assert 100.0 * np.mean([float(row["recall"]) for row in classes]) == pytest.approx(result["top1"])
    numbered = run_verb("eval", "--checkpoint", "output/tiny", "--imagenet-v2", "digits/val", cwd=workplace)
    assert json.loads(numbered.stdout.splitlines()[-1]) == result

    labels = []
    for number, path in enumerate(sorted((workplace / "digits/val").glob("*/*")), 1):
        link = workplace / "real/val" / path.parent.name / f"ILSVRC2012_val_{number:08d}{path.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
        labels.append([int(path.parent.name)])
    labels[0] = []
    (workplace / "real.json").write_text(json.dumps(labels))
    given = ["eval", "--checkpoint", "output/tiny", "-o", "data.root=real", "-o", "data.train=val"]
    real = run_verb(*given, "--real", "real.json", cwd=workplace)
    assert real.returncode == 0, real.stderr
    metrics = json.loads(real.stdout.splitlines()[-1])
    num_hits = round(result["top1"] * 30 / 100)
    assert metrics["num_images"] == 29 and round(metrics["top1"] * 29 / 100) in (num_hits - 1, num_hits)

    for target in ("converted.safetensors", "converted.npz"):
        converted = run_verb("convert", "--from", "output/tiny", "--to", target, cwd=workplace)
        assert converted.returncode == 0, converted.stderr
        again = run_verb("eval", "--checkpoint", target, "-c", "output/tiny/config.yaml", cwd=workplace)
        assert again.returncode == 0, again.stderr
        assert json.loads(again.stdout.splitlines()[-1]) == result

    none = run_verb("eval", "--checkpoint", "output/tiny", "--ema", cwd=workplace)
    assert none.returncode == 2 and "moving average" in none.stderr and none.stderr.count("\n") == 1


@pytest.mark.slow
def test_eval_export_and_predict_agree(workplace: Path) -> None:
    """eval repeats the last evaluation of the run; the exported model, file by file, has the same top-1."""
    last = [json.loads(line) for line in (workplace / "output/tiny/metrics.jsonl").read_text().splitlines()]
    last_eval = [line for line in last if line["kind"] == "eval"][-1]
    evaluated = run_verb("eval", "--checkpoint", "output/tiny", cwd=workplace)
    assert evaluated.returncode == 0, evaluated.stderr
    result = json.loads(evaluated.stdout.splitlines()[-1])
    assert result["top1"] == last_eval["top1"] and result["num_images"] == 30
    assert result["loss"] == pytest.approx(last_eval["loss"], rel=1e-6)

    other = run_verb("eval", "--checkpoint", "output/tiny/checkpoints/latest", "-o", "eval.batch_size=7", cwd=workplace)
    again = json.loads(other.stdout.splitlines()[-1])
    assert (again["top1"], again["top5"], again["num_images"]) == (result["top1"], result["top5"], 30)

    exported = run_sh("export", "--checkpoint", "output/tiny", "--weights", "last", "--out", "exported", cwd=workplace)
    assert exported.returncode == 0, exported.stderr
    difference = float(re.search(r"trained model's: ([\d.e+-]+), over 30", exported.stdout)[1])
    assert 0 < difference < 1e-4
    names = {path.name for path in (workplace / "exported").iterdir()}
    assert names == {"model.json", "model.pdiparams", "vit_static.json", "MODEL_CARD.md"}
    spec = json.loads((workplace / "exported/vit_static.json").read_text())
    assert spec["class_names"][3] == "three"
    assert spec["preprocessing"]["image_size"] == [16, 16] and spec["model"]["width"] == 32

    for batch_size, run in ((1, run_sh), (32, run_verb)):
        predicted = run("predict", "--model", "exported", "--batch-size", batch_size, "digits/val", cwd=workplace)
        assert predicted.returncode == 0, predicted.stderr
        lines = [json.loads(line) for line in predicted.stdout.splitlines()]
        assert len(lines) == 30
        hits = [line["top"][0]["class"] == int(Path(line["path"]).parent.name) for line in lines]
        assert 100.0 * np.mean(hits) == pytest.approx(result["top1"])
        assert all(sum(entry["probability"] for entry in line["top"]) <= 1.00001 for line in lines)


@pytest.mark.slow
@pytest.mark.needs_bfloat16
@pytest.mark.needs_paddle2onnx
def test_an_export_reports_the_precision_that_it_runs_in(workplace: Path) -> None:
    """bfloat16 on this CPU, compared with the trained model in float32; float16 needs a GPU."""
    export = ["export", "--checkpoint", "output/tiny", "--out"]
    low = run_verb(*export, "exported_low", "-o", "export.precision=bfloat16", cwd=workplace)
    assert low.returncode == 0, low.stderr
    assert json.loads((workplace / "exported_low/vit_static.json").read_text())["precision"] == "bfloat16"
    assert run_verb(*export, "exported_again", cwd=workplace).returncode == 0
    probabilities = []
    for folder in ("exported_again", "exported_low"):
        predicted = run_verb("predict", "--model", folder, "--top-k", "10", "digits/val", cwd=workplace)
        lines = [json.loads(line) for line in predicted.stdout.splitlines()]
        probabilities.append([[one["probability"] for one in line["top"]] for line in lines])
    np.testing.assert_allclose(probabilities[1], probabilities[0], atol=0.02)
    assert probabilities[1] != probabilities[0]
    small = run_verb(*export, "exported_int8", "-o", "export.precision=int8", cwd=workplace)
    assert small.returncode == 0 and "model.onnx (int8)" in small.stdout, small.stderr
    predicted = run_verb("predict", "--model", "exported_int8", "--top-k", "1", "digits/val", cwd=workplace)
    assert predicted.returncode == 0 and predicted.stdout.count("probability") == 30
    assert "int8 (as exported) on the CPU, ONNX Runtime" in predicted.stderr
    onnx = run_verb(*export, "exported_onnx", "--onnx", cwd=workplace)
    assert onnx.returncode == 0 and (workplace / "exported_onnx/model.onnx").is_file(), onnx.stderr
    half = run_verb(*export, "exported_half", "-o", "export.precision=float16", cwd=workplace)
    assert half.returncode == 2 and "needs a GPU" in half.stderr
    assert not (workplace / "exported_half").exists()


@pytest.mark.slow
def test_a_sharded_checkpoint_and_the_average_are_exported(workplace: Path) -> None:
    """A mesh's checkpoint exports the same bits as the run's merged weights, and likewise its average."""
    trained = run_forked_launch(
        *("pretrain", "-c", "tiny.yaml", "-o", "name=sharded", "-o", "train.max_steps=3", "-o", "parallel.mp=2"),
        *("-o", "optim.ema_decay=0.5"),
        cwd=workplace,
        NPROC="2",
    )
    assert trained.returncode == 0, trained.stderr
    parts = [path.name for path in (workplace / "output/sharded/checkpoints/latest/").glob("*.safetensors")]
    assert len(parts) >= 2
    written = {}
    for name, source in {
        "mesh": ["output/sharded/checkpoints/latest"],
        "merged": ["output/sharded/model.pdparams"],
        "mesh's average": ["output/sharded/checkpoints/latest", "--ema"],
        "merged average": ["output/sharded/model_ema.pdparams"],
    }.items():
        done = run_verb("export", "--checkpoint", *source, "--out", f"of {name}", cwd=workplace)
        assert done.returncode == 0, done.stderr
        written[name] = (workplace / f"of {name}" / "model.pdiparams").read_bytes()
    assert written["mesh"] == written["merged"] != written["merged average"] == written["mesh's average"]


@pytest.mark.slow
def test_predict_accepts_every_kind_of_image(workplace: Path) -> None:
    if not (workplace / "exported").exists():
        run_verb("export", "--checkpoint", "output/tiny", "--out", "exported", cwd=workplace)
    source = Image.open(next((workplace / "digits/val/7").iterdir()))
    odd = workplace / "odd images"
    odd.mkdir(exist_ok=True)
    transparent = source.convert("RGBA")
    transparent.putalpha(128)
    kinds = {
        "grey.png": source.convert("L"),
        "palette.png": source.convert("P"),
        "transparent.png": transparent,
        "sixteen bit.png": Image.fromarray(np.asarray(source.convert("L")).astype(np.uint16) * 257),
        "bilevel.png": source.convert("1"),
        "cmyk.jpg": source.convert("CMYK"),
        "wide.jpeg": source.resize((300, 40)),
    }
    white = Image.new("RGBA", source.size, "white")
    kinds["composed.png"] = Image.alpha_composite(white, transparent).convert("RGB")
    for name, image in kinds.items():
        image.save(odd / name)
    (odd / "broken.jpg").write_bytes(b"not an image")
    done = run_sh("predict", "--model", "exported", "--top-k", 1, odd, cwd=workplace)
    lines = {Path(line["path"]).name: line for line in map(json.loads, done.stdout.splitlines())}
    assert set(lines) == {*kinds, "broken.jpg"}
    assert "can't be read" in lines["broken.jpg"]["error"] and done.returncode == 2
    assert "1 image" in done.stderr and len(done.stderr.splitlines()) == 2  # the first says how the model is run
    assert all(len(lines[name]["top"]) == 1 for name in kinds)
    plain = run_verb(
        "predict", "--model", "exported", "--top-k", 1, next((workplace / "digits/val/7").iterdir()), cwd=workplace
    )
    expected = json.loads(plain.stdout)["top"][0]
    for name in ("grey.png", "sixteen bit.png"):
        assert lines[name]["top"][0]["name"] == expected["name"], name
        assert lines[name]["top"][0]["probability"] == pytest.approx(expected["probability"], abs=0.02), name
    assert lines["transparent.png"]["top"] == lines["composed.png"]["top"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_resumes_to_the_same_bits(workplace: Path, number: signal.Signals) -> None:
    """The signal stops the run after the step with exit code 75; the same command then ends as if never stopped.

    On SIGTERM with two threads; else with as many as the finished run of the fixture, which is the reference.
    """
    name, reference = f"stopped{int(number)}", "tiny"
    threads = {"OMP_NUM_THREADS": "2"} if number == signal.SIGTERM else {}
    if threads:
        reference = "unbroken"
        unbroken = ["pretrain", "-c", "tiny.yaml", "-o", "name=unbroken"]
        assert run_sh(*unbroken, cwd=workplace, **threads).returncode == 0
    arguments = ["pretrain", "-c", "tiny.yaml", "-o", f"name={name}"]
    process = subprocess.Popen(
        [ROOT / "run.sh", *arguments], cwd=workplace, env=os.environ | threads, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 5/"):
            process.send_signal(number)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 75
    assert "the state is saved" in rest
    assert not (workplace / f"output/{name}/model.pdparams").exists()
    done = run_sh(*arguments, cwd=workplace, **threads)
    assert done.returncode == 0 and "resumed from" in done.stdout
    expected, resumed = (read_state(workplace / f"output/{run}/model.pdparams") for run in (reference, name))
    assert all(np.array_equal(resumed[key], expected[key]) for key in expected)


@pytest.mark.usefixtures("signals_are_not_ignored")
def test_ctrl_c_while_python_starts_prints_no_traceback(tmp_path: Path) -> None:
    """The signal arrives as soon as Python has its own handler, which prints tracebacks."""
    process = subprocess.Popen(
        [ROOT / "run.sh", "models"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    proc = Path(f"/proc/{process.pid}")
    while True:
        caught = int(re.search(r"SigCgt:\s*(\w+)", (proc / "status").read_text())[1], 16)
        if b"python" in (proc / "cmdline").read_bytes().partition(b"\0")[0] and caught >> (signal.SIGINT - 1) & 1:
            break
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert output == b"" and process.returncode == -signal.SIGINT


@pytest.mark.slow
@pytest.mark.usefixtures("signals_are_not_ignored")
def test_a_closed_terminal_saves_the_state_of_every_process(workplace: Path) -> None:
    """SIGHUP, through run.sh and the launcher: as for SIGTERM."""
    overrides = ["-o", "name=hangup", "-o", "train.epochs=1000", "-o", "log.every_steps=1"]
    arguments = ["pretrain", "-c", "tiny.yaml", *overrides]
    process = subprocess.Popen(
        [ROOT / "run.sh", *arguments], cwd=workplace, env=os.environ | {"NPROC": "2"}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert any(line.startswith("step 2/") for line in process.stdout)
    report = workplace / "output/hangup/report.html"
    assert '"refresh_s":10.0' in report.read_text()  # it is there from the start, and reloads itself
    process.send_signal(signal.SIGHUP)
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 75
    assert '"refresh_s":null' in report.read_text() and '"curve-train-loss"' in report.read_text()
    step = int(rest.rpartition("stopped by a signal at step ")[2].partition(";")[0])
    shards = (workplace / f"output/hangup/checkpoints/step_{step:08d}").glob("*.safetensors")
    assert len(list(shards)) == 2


@pytest.mark.slow
def test_two_processes_train_as_one(workplace: Path) -> None:
    """The same images, augmentations and losses; dropout off, since each rank draws its own masks."""
    losses, evaluations = {}, {}
    for nproc in ("1", "2"):
        name = f"dp{nproc}"
        done = run_forked_launch(
            "pretrain", "-c", "tiny.yaml", "-o", f"name={name}", "-o", "model.dropout=0", "-o", "log.every_steps=1",
            "-o", "amp.level=O0", cwd=workplace, NPROC=nproc,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (workplace / f"output/{name}/metrics.jsonl").read_text().splitlines()]
        losses[nproc] = [line["loss"] for line in lines if line["kind"] == "train"]
        evaluations[nproc] = [line for line in lines if line["kind"] == "eval"]
    np.testing.assert_allclose(losses["2"], losses["1"], rtol=1e-4)
    for one, two in zip(evaluations["1"], evaluations["2"], strict=True):
        assert two["num_images"] == 30 and two["top1"] == one["top1"]
    errors = [json.loads((workplace / f"output/dp{nproc}/evaluation.json").read_text()) for nproc in ("1", "2")]
    for one, two in zip(*(each["images"] for each in errors), strict=True):
        for key in ("loss", "probability"):  # the order of additions shows in their last digits
            assert two.pop(key) == pytest.approx(one.pop(key), rel=1e-3)
    for one, two in zip(*(each["examples"] for each in errors), strict=True):
        assert two.pop("probability") == pytest.approx(one.pop("probability"), rel=1e-3)
    for one, two in zip(*(each["calibration"]["bins"] for each in errors), strict=True):
        assert two.pop("confidence") == pytest.approx(one.pop("confidence"), rel=1e-3)
    assert errors[0] == errors[1] and errors[0]["images"]
    evaluated = [
        json.loads(run_forked_launch("eval", "--checkpoint", path, cwd=workplace, NPROC=n).stdout.splitlines()[-1])
        for n, path in (("1", "output/dp2"), ("2", "output/dp2/checkpoints/latest"))
    ]
    assert evaluated[0]["top1"] == evaluated[1]["top1"] and evaluated[1]["num_images"] == 30
    assert evaluated[0]["loss"] == pytest.approx(evaluated[1]["loss"], rel=1e-6)


def losses_of_ten_steps(workplace: Path, name: str, nproc: str, *overrides: str) -> list[float]:
    common = ["-c", "tiny.yaml", "-o", "model.dropout=0", "-o", "log.every_steps=1", "-o", "train.max_steps=10"]
    common += ["-o", "schedule.name=constant", "--resume", "never"]
    given = [argument for override in (f"name={name}", *overrides) for argument in ("-o", override)]
    done = run_forked_launch("pretrain", *common, *given, cwd=workplace, NPROC=nproc)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (workplace / f"output/{name}/metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"][-10:]


@pytest.fixture(scope="module")
def losses_in_float32(workplace: Path) -> list[float]:
    return losses_of_ten_steps(workplace, "low_1", "1", "amp.level=O0")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        (["amp.level=O0", "parallel.reduce_dtype=float16"], 2e-3),
        # On a CPU without bfloat16 products these would be the float32 of parallel/test_meshes.py.
        pytest.param(["parallel.sharding_stage=2"], 2e-2, marks=pytest.mark.needs_bfloat16),
        pytest.param(["parallel.mp=2"], 2e-2, marks=pytest.mark.needs_bfloat16),
        pytest.param(["parallel.sharding_stage=3"], 2e-2, marks=pytest.mark.needs_bfloat16),
    ],
    ids=["gradients in float16", "ZeRO 2 in the default precision", "mp 2 in it", "ZeRO 3 in it"],
)
def test_two_processes_in_low_precision(
    workplace: Path, losses_in_float32: list[float], overrides: list[str], tolerance: float
) -> None:
    """As one process in float32, within rounding."""
    losses = losses_of_ten_steps(workplace, "low_2", "2", *overrides)
    np.testing.assert_allclose(losses, losses_in_float32, rtol=tolerance)


# A run's meshes, one after the other: (processes, overrides). Its state is resharded at each change: from ZeRO 3 to
# tensor parallelism with moments split over data parallelism, to pipeline stages, to one process.
MESHES = [
    ("2", ["parallel.sharding_stage=3"]),
    ("4", ["parallel.mp=2", "parallel.sharding_stage=1"]),
    ("2", ["parallel.pp=2"]),
    ("1", []),
]


@pytest.mark.slow
def test_a_run_resumes_on_other_meshes(workplace: Path) -> None:
    """The losses are those of the uninterrupted run, and the images come in the same order."""
    common = ["-c", "tiny.yaml", "-o", "model.dropout=0", "-o", "log.every_steps=1", "-o", "optim.ema_decay=0.9"]
    common += ["-o", "model.depth=2"]  # for two pipeline stages
    common += ["-o", "amp.level=O0"]  # in bfloat16 the order of additions shows
    common += ["-o", "schedule.name=constant"]  # the rate does not depend on where a run ends

    def train(name: str, steps: int, nproc: str, *overrides: str) -> None:
        given = [
            argument for other in (f"name={name}", f"train.max_steps={steps}", *overrides) for argument in ("-o", other)
        ]
        done = run_forked_launch("pretrain", *common, *given, cwd=workplace, NPROC=nproc)
        assert done.returncode == 0, done.stderr

    def losses(name: str, kind: str, key: str) -> dict[int, float]:
        lines = [json.loads(line) for line in (workplace / f"output/{name}/metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line[key] for line in lines if line["kind"] == kind}

    for number, (nproc, overrides) in enumerate(MESHES, 1):
        train("wandering", 2 * number, nproc, *overrides)
        if nproc == "4":  # each rank writes its own shard, and none the whole state
            parts = (workplace / "output/wandering/checkpoints/latest/").glob("rank_*.safetensors")
            sizes = [path.stat().st_size for path in parts]
            assert len(sizes) == 4 and max(sizes) < 1.2 * sum(sizes) / 4
    train("one_mesh", 2 * len(MESHES), "1")
    expected, actual = losses("one_mesh", "train", "loss"), losses("wandering", "train", "loss")
    assert actual.keys() == expected.keys()
    np.testing.assert_allclose([actual[step] for step in expected], list(expected.values()), rtol=1e-5)
    last = 2 * len(MESHES)
    for key in ("loss", "ema_loss"):
        evaluated = losses("wandering", "eval", key)[last]
        assert evaluated == pytest.approx(losses("one_mesh", "eval", key)[last], rel=1e-5)
    run = workplace / "output/wandering"
    for file in ("model.pdparams", "model_ema.pdparams"):
        weights, reference = read_state(run / file), read_state(workplace / "output/one_mesh" / file)
        assert {key: value.shape for key, value in weights.items()} == {
            key: value.shape for key, value in reference.items()
        }


def test_the_verbs_are_listed(workplace: Path) -> None:
    done = run_sh("--help", cwd=workplace)
    assert done.returncode == 0
    for verb in [
        "setup",
        "test",
        "data",
        "pretrain",
        "finetune",
        "eval",
        "export",
        "predict",
        "serve",
        "plan",
        "bench",
    ]:
        assert f"    {verb} " in done.stdout
