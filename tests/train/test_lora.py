"""LoRA runs: what their checkpoints hold, exact resumes, merged weights, and frozen weights that are gone."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest
from helpers import numpy_vit
from helpers.forked_verbs import run_verb
from helpers.runs import TINY, metrics
from helpers.small import SMALL, images_and_labels, model_logits, read_state
from PIL import Image
from safetensors.numpy import load_file

from vit_static.checkpoint.folder import checkpoint_dir
from vit_static.common.errors import ConfigError, WeightsError
from vit_static.config.loader import load_config
from vit_static.config.lora_schema import LoraConfig
from vit_static.config.schema import Config
from vit_static.model.lora import add_adapters
from vit_static.model.vit import VisionTransformer
from vit_static.train.averaging import average_runs
from vit_static.train.evaluate import evaluate_checkpoint
from vit_static.train.trainer import train
from vit_static.weights.convert import convert_weights
from vit_static.weights.source import load_weights
from vit_static.weights.state import split_qkv

pytestmark = pytest.mark.early

RANK, ALPHA, WIDTH, MLP_DIM, NUM_CLASSES = 3, 6.0, 32, 64, 10
LAYERS = {
    **{f"attn.{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "proj")},
    **{"mlp.fc1": (WIDTH, MLP_DIM), "mlp.fc2": (MLP_DIM, WIDTH)},
}


@pytest.fixture(scope="module")
def base(finished: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the weights of a finished run."""
    folder = tmp_path_factory.mktemp("base")
    for name in ("model.pdparams", "config.yaml", "class_names.txt"):
        shutil.copy(finished.run_dir / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def lora_run(base: Path, small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Return the config of a finished LoRA run of 11 steps, with all kinds of dropout and a moving average."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "lora.yaml").write_text(TINY)
    overrides = [
        *(f"data.root={small_digits}", f"output_dir={folder}", f"init.from={base}", "optim.ema_decay=0.5"),
        *(f"lora.rank={RANK}", f"lora.alpha={ALPHA}", "lora.dropout=0.1", "optim.lr=0.02"),
    ]
    config = load_config(folder / "lora.yaml", overrides)
    assert train(config)
    return config


@pytest.fixture
def copied(lora_run: Config, tmp_path: Path) -> Config:
    """Return the config of a copy of that run."""
    shutil.copytree(lora_run.run_dir, tmp_path / "copy", symlinks=True)
    return lora_run.model_copy(update={"output_dir": str(tmp_path), "name": "copy"})


def shard(config: Config, step: int = 11) -> dict[str, np.ndarray]:
    return load_file(checkpoint_dir(config.run_dir, step) / "rank_00000.safetensors")


def test_a_checkpoint_holds_only_adapters_and_head_with_their_optimizer_state(lora_run: Config) -> None:
    shapes: dict[str, tuple[int, ...]]
    shapes = {f"blocks.0.{layer}.lora_a": (inputs, RANK) for layer, (inputs, _) in LAYERS.items()}
    shapes |= {f"blocks.0.{layer}.lora_b": (RANK, outputs) for layer, (_, outputs) in LAYERS.items()}
    shapes |= {"head.weight": (WIDTH, NUM_CLASSES), "head.bias": (NUM_CLASSES,)}
    arrays = shard(lora_run)
    for suffix in ("", "@moment1", "@moment2", "@ema"):
        for name, shape in shapes.items():
            assert arrays.pop(f"{name}{suffix}").shape == shape
    assert set(arrays) == {f"{name}@beta{order}_pow_acc" for name in shapes for order in (1, 2)}
    assert not list(lora_run.run_dir.glob("*.pdparams"))
    step = checkpoint_dir(lora_run.run_dir, 11)
    num_values = 4 * sum(map(math.prod, shapes.values())) + 2 * len(shapes)
    assert 4 * num_values < (step / "rank_00000.safetensors").stat().st_size < 4 * num_values + 25_000
    assert json.loads((step / "meta.json").read_text())["lora_base"]["source"].endswith("/model.pdparams")
    assert metrics(lora_run.run_dir, "event")[-1]["event"] == "finished"


def test_a_resume_gives_the_same_bits(copied: Config) -> None:
    expected = shard(copied)
    assert train(copied, resume=str(checkpoint_dir(copied.run_dir, 4)))
    resumed = shard(copied)
    assert resumed.keys() == expected.keys()
    assert all(resumed[name].tobytes() == expected[name].tobytes() for name in expected)


def test_a_rank_above_the_width_is_refused() -> None:
    add_adapters(VisionTransformer(SMALL), LoraConfig(rank=SMALL.width or 0))
    with pytest.raises(ConfigError, match=r"^lora\.rank = 1000: is above the model's width of \d+; set a rank of"):
        add_adapters(VisionTransformer(SMALL), LoraConfig(rank=1000))


def test_adapters_start_from_the_base_and_follow_the_seed() -> None:
    """A is uniform within 1 / sqrt(inputs), and B zero."""
    config = load_config(None, ["name=x"]).model.model_copy(update={"depth": 1, "image_size": (32, 32)})
    images = images_and_labels(2, config)[0]
    drawn = []
    for _ in range(2):
        paddle.seed(4)
        model = VisionTransformer(config)
        expected = model_logits(model, images)
        names = [name for name, _ in model.named_parameters()]
        add_adapters(model, LoraConfig(rank=64, targets=("q", "mlp")))
        assert np.array_equal(model_logits(model, images), expected)
        assert [name for name, _ in model.named_parameters() if ".lora_" not in name] == names
        drawn.append({name: value.numpy() for name, value in model.named_parameters() if ".lora_" in name})
    assert {name.split(".")[-2] for name in drawn[0]} == {"q", "fc1", "fc2"}
    assert all(np.array_equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    a = drawn[0]["blocks.0.mlp.fc1.lora_a"]
    bound = a.shape[0] ** -0.5
    assert 0.99 * bound < np.abs(a).max() <= bound and a.std() == pytest.approx(bound / math.sqrt(3.0), rel=0.02)
    assert not drawn[0]["blocks.0.mlp.fc1.lora_b"].any()


@pytest.mark.parametrize("ema", [False, True])
def test_merged_weights_compute_what_the_adapters_do(lora_run: Config, base: Path, ema: bool) -> None:
    """In float64 after the paper's equation, W + alpha / rank A B; and the verb `eval` gives the loss of the run."""
    suffix = "@ema" if ema else ""
    arrays = shard(lora_run)
    trained = {name: arrays[f"{name}{suffix}"] for name in arrays if "@" not in name}
    expected = split_qkv(read_state(base / "model.pdparams")) | {
        name: value for name, value in trained.items() if name.startswith("head.")
    }
    expected = {name: value.astype(np.float64) for name, value in expected.items()}
    for layer in LAYERS:
        a, b = (trained[f"blocks.0.{layer}.lora_{part}"].astype(np.float64) for part in "ab")
        assert np.abs(b).max() > 1e-3
        expected[f"blocks.0.{layer}.weight"] += ALPHA / RANK * a @ b
    loaded = load_weights(lora_run.run_dir, ema=ema)
    merged = split_qkv(loaded.state)
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(merged[name], value, rtol=1e-6, atol=1e-7, err_msg=name)
    model = VisionTransformer(lora_run.model)
    model.set_state_dict({name: paddle.to_tensor(value) for name, value in merged.items()})
    images = images_and_labels(4, lora_run.model)[0]
    exact = numpy_vit.logits(loaded.state, images.numpy(), patch_size=8, num_heads=2)
    np.testing.assert_allclose(model_logits(model, images), exact, rtol=1e-5, atol=1e-5)


def test_eval_gives_the_results_of_the_run(lora_run: Config, capfd: pytest.CaptureFixture[str]) -> None:
    """The run evaluates with adapters, the verb with merged weights."""
    evaluate_checkpoint(None, lora_run.run_dir, [], ema=False)
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["loss"] == pytest.approx(metrics(lora_run.run_dir, "eval")[-1]["loss"], rel=1e-6)


def test_an_average_of_checkpoints_is_that_of_merged_weights(lora_run: Config, tmp_path: Path) -> None:
    average_runs(None, [lora_run.run_dir], [], last=2, out=tmp_path / "average")
    states = [load_weights(checkpoint_dir(lora_run.run_dir, step)).state for step in (8, 11)]
    averaged = load_weights(tmp_path / "average")
    assert averaged.config.lora.rank == 0
    for name, value in averaged.state.items():
        np.testing.assert_allclose(value, (states[0][name].astype(np.float64) + states[1][name]) / 2, atol=1e-7)


def test_probe_and_visualize_use_the_merged_weights(
    lora_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a file with these weights and the run's class names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options: dict = {"to": None, "head": "keep", "image_size": None, "fold_layer_scale": False}
    convert_weights(None, lora_run.run_dir, tmp_path / "merged.pdparams", [], **options, ema=False, lora="merged")
    shutil.copy(lora_run.run_dir / "class_names.txt", tmp_path)
    run = ["--checkpoint", lora_run.run_dir]
    config = ["-c", lora_run.run_dir / "config.yaml", "-o", "lora.rank=0", "-o", "init.from=null"]
    merged = [*config, "--checkpoint", tmp_path / "merged.pdparams"]
    image = next(Path(lora_run.data.root).glob("val/*/*"))
    probed = {}
    for name, source in (("run", run), ("merged", merged)):
        done = run_verb("probe", *source, "--only", "knn", "--json", f"{name}.json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        probed[name] = json.loads((tmp_path / f"{name}.json").read_text())["knn"]
        done = run_verb("visualize", *source, "--out", name, image, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert probed["run"] == probed["merged"]
    pictures = [path.name for path in (tmp_path / "run").glob("*.png")]
    assert len(pictures) > 1
    for name in pictures:
        ours, expected = (np.asarray(Image.open(tmp_path / part / name), np.float32) for part in ("run", "merged"))
        np.testing.assert_array_equal(ours, expected, err_msg=name)


def test_a_run_that_stops_early_names_its_checkpoints(
    lora_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = lora_run.model_dump(mode="json", by_alias=True)
    values |= {"output_dir": str(tmp_path), "eval": {"every_epochs": 0.25, "metric": "loss"}}
    values["train"] |= {"patience": 1, "min_delta": 1000.0}
    config = Config.model_validate(values)
    assert train(config)
    assert [event["event"] for event in metrics(config.run_dir, "event")][-2:] == ["early stop", "finished"]
    last = metrics(config.run_dir, "eval")[-1]["step"]
    assert last < 11 and str(checkpoint_dir(config.run_dir, last)) in capsys.readouterr().out.splitlines()[-1]
    assert load_weights(config.run_dir).state["head.bias"].shape == (NUM_CLASSES,)


def test_frozen_weights_that_are_gone_or_changed_are_named_with_the_remedy(copied: Config, tmp_path: Path) -> None:
    """Wherever they are now, init.from finds them; other weights are refused."""
    base = Path(copied.init.from_)
    moved = tmp_path / "moved.pdparams"
    expected = load_weights(copied.run_dir).state
    (base / "model.pdparams").rename(moved)
    try:
        for action in (lambda: load_weights(copied.run_dir), lambda: train(copied)):
            with pytest.raises(WeightsError, match=r"are no longer at .*model\.pdparams; .*-o init\.from=PATH"):
                action()
        loaded = load_weights(copied.run_dir, overrides=["eval.crop_pct=1.0", f"init.from={moved}"])
        assert all(np.array_equal(loaded.state[name], value) for name, value in expected.items())
        assert train(copied.model_copy(update={"init": copied.init.model_copy(update={"from_": str(moved)})}))
        moved.rename(base / "model.pdparams")
        shutil.copy(base / "model.pdparams", moved)
        other = copied.model_copy(update={"init": copied.init.model_copy(update={"from_": str(copied.run_dir)})})
        with pytest.raises(WeightsError, match="are other weights than those that the adapters"):
            train(other)
    finally:
        if not (base / "model.pdparams").exists():
            moved.rename(base / "model.pdparams")


@pytest.mark.parametrize("ema", [False, True])
def test_adapters_alone_are_a_file_that_can_be_loaded(lora_run: Config, tmp_path: Path, ema: bool) -> None:
    """In peft's layout, and many times smaller; with the same weights as the run's checkpoint."""
    path = tmp_path / "adapter_model.safetensors"
    options: dict = {"to": None, "head": "keep", "image_size": None, "fold_layer_scale": False}
    convert_weights(None, lora_run.run_dir, path, [], **options, ema=ema, lora="adapters")
    names = {name.removeprefix("base_model.model.") for name in load_file(path)}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    adapters = {f"blocks.0.{layer}.lora_{part}.weight" for layer in layers for part in "AB"}
    assert names == {"head.weight", "head.bias"} | adapters
    assert path.stat().st_size < checkpoint_dir(lora_run.run_dir, 11).joinpath("rank_00000.safetensors").stat().st_size
    expected = load_weights(lora_run.run_dir, ema=ema).state
    for source in (path, tmp_path):
        state = load_weights(source).state
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(state[name], value, rtol=1e-6, atol=1e-7, err_msg=name)
    target = tmp_path / "merged.pdparams"
    convert_weights(None, tmp_path, target, [], **options, ema=False, lora="merged")
    merged = read_state(target)
    assert all(np.array_equal(merged[name], state[name]) for name in state)
    with pytest.raises(WeightsError, match="has no adapters; leave the option out"):
        convert_weights(None, target, tmp_path / "2.npz", [], **options, ema=False, lora="merged")
    with pytest.raises(WeightsError, match="is no run with LoRA"):
        convert_weights(None, target, path, [], **options, ema=False, lora="adapters")
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(WeightsError, match=r"adapter_config\.json: is missing"):
        load_weights(path)


def test_a_lora_run_is_no_base_of_another(lora_run: Config, tmp_path: Path) -> None:
    init = lora_run.init.model_copy(update={"from_": str(lora_run.run_dir)})
    with pytest.raises(WeightsError, match=r"run with LoRA; merge them into a file first \(\./run\.sh convert"):
        train(lora_run.model_copy(update={"init": init, "output_dir": str(tmp_path)}))


def test_another_rank_cannot_resume(copied: Config) -> None:
    with pytest.raises(ConfigError, match=r"lora\.rank = 4 \(it was 3\)"):
        train(copied.model_copy(update={"lora": copied.lora.model_copy(update={"rank": 4})}))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.rank=4"], r"lora\.rank=4: adapters need the weights that they adapt; set init\.from"),
        (["lora.rank=4", "init.from=x", "train.freeze=backbone"], r"only the adapters and the head are trained anyway"),
        (["lora.rank=4", "init.from=x", "lora.targets=[]"], "name at least one of q, k, v, proj, mlp"),
        (["lora.targets=[q,q]"], "names a layer twice"),
        (["lora.targets=[fc1]"], "lora.targets"),
    ],
)
def test_mistakes_in_the_config_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["name=x", *overrides])
