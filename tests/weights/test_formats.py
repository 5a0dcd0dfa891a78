"""Weights of other programs: files that they made, whose logits our model gives; and back, bit for bit."""

from __future__ import annotations

import json
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
import safetensors
from helpers.small import REFERENCE, ROOT, SMALL, model_logits, random_state

from vit_static.__main__ import main
from vit_static.common.errors import WeightsError
from vit_static.config.schema import InitConfig, ModelConfig
from vit_static.model.pos_embed import resample_pos_embed
from vit_static.model.vit import VisionTransformer
from vit_static.weights import readers
from vit_static.weights.convert import convert_state, infer_config, write_converted
from vit_static.weights.formats import ExternalWeights, fuse_qkv, read_weights, save_file
from vit_static.weights.load import init_from

WEIGHTS = REFERENCE / "weights"
FILES = {
    **{name: f"{name}.safetensors" for name in ("timm_vit", "timm_avg_fc_norm", "timm_gap_no_class")},
    **{name: f"{name}.safetensors" for name in ("timm_deit3", "timm_dinov2_reg")},
    **{name: f"{name}/model.safetensors" for name in ("hf_vit", "hf_dinov2", "hf_dinov2_registers")},
    **{name: f"{name}.npz" for name in ("vit_jax", "vit_jax_gap")},
    **{name: f"{name}.npz" for name in ("big_vision_tok", "big_vision_gap_sincos", "big_vision_scan")},
    **{name: f"{name}.pdparams" for name in ("plsc", "plsc_fp16", "plsc_finetuned", "paddleclas")},
}
HEADS = ["model.num_heads=4"]  # which timm's and Paddle's files don't tell; of 20 channels nothing can be concluded
WIDE, SIZE = (12, 20), ["--image-size", "12", "20"]
LATER = {"timm_vit", "timm_gap_no_class", "vit_jax", "vit_jax_gap"}  # of a grid of 3x5, which is no square
LATER |= {"big_vision_tok", "big_vision_gap_sincos", "big_vision_scan"}


def golden(name: str) -> tuple[np.ndarray, np.ndarray]:
    kind = (
        "jax"
        if name.startswith(("vit_jax", "big_vision"))
        else "paddle"
        if name.startswith(("plsc", "paddleclas"))
        else "torch"
    )
    arrays = np.load(WEIGHTS / f"{kind}.npz")
    return arrays[f"{name}/images"], arrays[f"{name}/logits"]


def model_of_file(name: str, *overrides: str) -> tuple[ExternalWeights, ModelConfig]:
    found = read_weights(WEIGHTS / FILES[name])
    size = WIDE if name in LATER else None
    return found, infer_config(found, name, [*HEADS, *overrides], size).model


def loaded(found: ExternalWeights, config: ModelConfig) -> Any:
    model = VisionTransformer(config)
    grid = (config.image_size[0] // 4, config.image_size[1] // 4)
    report = init_from(model, config, found, "golden", InitConfig(head="keep"), grid)
    assert not report.reinitialized and not report.resampled
    return model


@pytest.mark.parametrize("name", FILES)
def test_another_programs_weights_give_its_logits(name: str) -> None:
    images, expected = golden(name)
    logits = model_logits(loaded(*model_of_file(name)), paddle.to_tensor(images))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", FILES)
def test_the_way_back_gives_the_same_bits(tmp_path: Path, name: str) -> None:
    """In the file's own format, every array of it; of scanned blocks one by one, of a pickle in float32."""
    found, config = model_of_file(name)
    original = WEIGHTS / FILES[name]
    suffix = original.suffix
    to = {"plsc": "plsc", "paddleclas": "plsc", "timm": "timm", "hf": "huggingface"}.get(name.split("_")[0], "google")
    state = convert_state(found, config, "golden", InitConfig(head="keep"), grid_of(config))[0]
    target = tmp_path / f"back{suffix}"
    write_converted(state, config, target, to)
    again = read_weights(target)
    assert again.state.keys() == found.state.keys()
    assert all(again.state[key].tobytes() == found.state[key].tobytes() for key in found.state)
    if to == "timm":
        assert target.read_bytes()[:8] and arrays_of(target).keys() == arrays_of(original).keys()
    if to == "huggingface":
        theirs, ours = (json.loads((path.parent / "config.json").read_text()) for path in (original, target))
        shared = (theirs.keys() & ours.keys()) - {"id2label", "use_mask_token"}
        assert {"num_attention_heads", "patch_size", "layer_norm_eps", "architectures"} < shared
        assert {key: theirs[key] for key in shared} == {key: ours[key] for key in shared}


def grid_of(config: ModelConfig) -> tuple[int, int]:
    return config.image_size[0] // 4, config.image_size[1] // 4


def arrays_of(path: Path) -> dict[str, Any]:
    return dict(safetensors.deserialize(path.read_bytes()))


def test_the_names_are_those_of_the_other_program(tmp_path: Path) -> None:
    """Every array under the peer's own name and shape, with its values: what the peer then reads."""
    for name in ("timm_vit", "timm_dinov2_reg", "hf_vit", "hf_dinov2", "vit_jax", "vit_jax_gap"):
        found, config = model_of_file(name)
        original, target = WEIGHTS / FILES[name], tmp_path / name / f"weights{Path(FILES[name]).suffix}"
        target.parent.mkdir()
        to = "google" if name.startswith("vit_jax") else "timm" if name.startswith("timm") else "huggingface"
        write_converted(found.state, config, target, to)
        if to == "google":
            theirs = {published(key): array for key, array in np.load(original).items()}
            ours = dict(np.load(target))
            assert theirs.keys() == ours.keys()
            assert all(np.array_equal(theirs[key], ours[key]) for key in theirs)
        else:
            theirs, ours = arrays_of(original), arrays_of(target)
            assert theirs.keys() - {"dinov2.embeddings.mask_token"} == ours.keys()
            assert all(theirs[key]["shape"] == ours[key]["shape"] for key in ours)
            assert all(bytes(theirs[key]["data"]) == bytes(ours[key]["data"]) for key in ours)


def published(name: str) -> str:
    """As it is in the published checkpoints, from before Flax counted the parts of a block by their class."""
    name = name.replace("Attention_0", "Attention_1").replace("MlpBlock_0", "MlpBlock_3")
    return re.sub(r"(encoderblock_\d+)/LayerNorm_1", r"\1/LayerNorm_2", name)


def test_a_layer_scale_can_be_folded_for_a_program_without(tmp_path: Path) -> None:
    found, config = model_of_file("timm_deit3")
    with pytest.raises(WeightsError, match="--fold-layer-scale"):
        write_converted(found.state, config, tmp_path / "vit.npz", "google")
    plain = config.model_copy(update={"layer_scale_init": None, "class_token_pos_embed": True, "gelu": "erf"})
    state, report = convert_state(found, plain, "deit3", InitConfig(head="keep"), (3, 3))
    assert len(report.folded) == 4
    write_converted(state, plain, tmp_path / "vit.npz", "google")
    images, expected = golden("timm_deit3")
    again = read_weights(tmp_path / "vit.npz")
    logits = model_logits(loaded(again, plain), paddle.to_tensor(images))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_what_the_target_computes_otherwise_is_told(tmp_path: Path, capfd) -> None:
    for target, said in (("x.npz", "google computes with model.gelu=tanh"), ("x.safetensors", "")):
        given = [
            "--from",
            str(WEIGHTS / FILES["timm_deit3"]),
            "--to",
            str(tmp_path / target),
            "-o",
            "model.num_heads=4",
        ]
        assert main(["convert", *given, "--fold-layer-scale"]) == 0
        assert ("note: " in (out := capfd.readouterr().out)) == bool(said) and said in out


def test_another_programs_config_is_left_alone(tmp_path: Path) -> None:
    found, config = model_of_file("hf_vit")
    (tmp_path / "config.json").write_text('{"mine": 1}')
    with pytest.raises(WeightsError, match="choose another folder"):
        write_converted(found.state, config, tmp_path / "model.safetensors", "huggingface")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_what_a_program_computes_otherwise_is_told() -> None:
    """vit_jax's GELU is Flax's approximation, Hugging Face's epsilon another: a finetune is told of both."""
    for name, said in (("vit_jax", "model.gelu=tanh"), ("hf_vit", "model.layer_norm_epsilon=1e-12")):
        found, config = model_of_file(name)
        ours = config.model_copy(update={"gelu": "erf", "layer_norm_epsilon": 1e-6})
        report = init_from(VisionTransformer(ours), ours, found, name, InitConfig(), grid_of(config))
        assert any(said in note for note in report.notes)


@pytest.mark.parametrize(
    ("mode", "grid"), [(mode, grid) for mode in ("bilinear", "antialias") for grid in ("4x7", "2x3", "6x10")]
)
def test_position_embeddings_are_resampled_as_vit_jax_and_timm_do(mode: Any, grid: str) -> None:
    arrays = np.load(REFERENCE / "pos_embed_modes.npz")
    rows, columns = map(int, grid.split("x"))
    got = resample_pos_embed(arrays["input"], (3, 5), (rows, columns), mode)
    np.testing.assert_allclose(got, arrays[f"{mode}/{grid}"], atol=2e-6)
    assert np.array_equal(got[:, 0], arrays["input"][:, 0])


# What is refused


def saved(path: Path, change: Any, name: str = "timm_vit") -> Path:
    """A timm file with other arrays."""
    arrays = {
        key: np.frombuffer(value["data"], "<f4").reshape(value["shape"])
        for key, value in arrays_of(WEIGHTS / FILES[name]).items()
    }
    save_file(change(arrays), path)
    return path


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("attn_pool.latent", "pools by attention"),
        ("dist_token", "distilled"),
        ("blocks.0.attn.q_norm.weight", "normalizes queries and keys"),
        ("blocks.0.mlp.w12.weight", "SwiGLU"),
        ("something.else", "which those files don't have"),
    ],
)
def test_models_that_this_one_is_not_are_refused_with_the_reason(tmp_path: Path, added: str, said: str) -> None:
    path = saved(tmp_path / "odd.safetensors", lambda arrays: {**arrays, added: np.ones(3, np.float32)})
    with pytest.raises(WeightsError, match=said) as error:
        read_weights(path)
    assert added in str(error.value)


def test_attention_pooling_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"MAPHead_0.*pools by attention"):
        read_weights(WEIGHTS / "big_vision_map.npz")


def test_paddleclas_small_vit_is_refused(tmp_path: Path) -> None:
    """It divides attention's scores by the root of its width, not of a head's channels, and no array tells that."""
    state = {"patch_embed.proj.weight": np.zeros((768, 3, 16, 16), np.float32)}
    for block in range(8):
        state[f"blocks.{block}.attn.qkv.weight"] = np.zeros((768, 3 * 768), np.float16)
        state[f"blocks.{block}.mlp.fc1.weight"] = np.zeros((768, 2304), np.float16)
    (tmp_path / "small.pdparams").write_bytes(pickle.dumps(state))
    with pytest.raises(WeightsError, match="ViT_small"):
        read_weights(tmp_path / "small.pdparams")


def test_pretrainings_parts_are_dropped_by_name(tmp_path: Path) -> None:
    decoder = {"mask_token": np.ones((1, 1, 20), np.float32), "decoder_embed.weight": np.ones((8, 20), np.float32)}
    path = saved(tmp_path / "mae.safetensors", lambda arrays: {**arrays, **decoder})
    assert read_weights(path).dropped.keys() == decoder.keys()


def test_what_is_no_weight_is_dropped_by_name(tmp_path: Path) -> None:
    counter = {"num_batches": np.array([3], np.int64)}
    assert list(read_weights(saved(tmp_path / "x.safetensors", lambda arrays: arrays | counter)).dropped) == [
        "num_batches"
    ]


def test_pytorchs_own_files_are_refused_with_the_remedy(tmp_path: Path) -> None:
    """As torch.save writes them: today's zip, and the pickle of before."""
    with zipfile.ZipFile(tmp_path / "vit.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    (tmp_path / "old.bin").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps({}))
    for name in ("vit.pth", "old.bin"):
        with pytest.raises(WeightsError, match=r"safetensors\.torch\.save_file") as error:
            read_weights(tmp_path / name)
        assert name in str(error.value)


def object_array(path: Path) -> None:
    np.savez(path.with_suffix(".tmp.npz"), a=np.array([{}], object))
    path.with_suffix(".tmp.npz").rename(path)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"weights, weights everywhere, and not"),
    "a zip of nothing": lambda path: zipfile.ZipFile(path, "w").close(),
    "objects": object_array,
    "half an npz": lambda path: path.write_bytes((WEIGHTS / "vit_jax.npz").read_bytes()[:9000]),
    "half a safetensors": lambda path: path.write_bytes((WEIGHTS / FILES["timm_vit"]).read_bytes()[:9000]),
    "a huge header": lambda path: path.write_bytes(struct.pack("<Q", 2**40) + b"{" + b" " * 100),
    "no header": lambda path: path.write_bytes(struct.pack("<Q", 10) + b'{"a":12345' + b" " * 10),
    "other arrays": lambda path: save_file({"a": np.ones(3, np.float32)}, path),
    "half a pickle": lambda path: path.write_bytes((WEIGHTS / "plsc.pdparams").read_bytes()[:9000]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "damaged"
    DAMAGES[damage](path)
    with pytest.raises(WeightsError, match="damaged") as error:
        read_weights(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_bfloat16_is_read(tmp_path: Path) -> None:
    """As torch saves it in safetensors, as Paddle in a pickle (its bits), as JAX in an npz (bytes without a name)."""
    values = np.array([1.0, -2.5, 3.140625], np.float32)  # exact in bfloat16
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    header = json.dumps({"patch_embed.proj.bias": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}).encode()
    # Alone these arrays are no model; what is looked at is how they are read.
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bits.tobytes())
    assert np.array_equal(readers._read_safetensors(tmp_path / "a.safetensors")["patch_embed.proj.bias"], values)
    np.savez(tmp_path / "a.npz", bias=bits.view("V2"))
    assert np.array_equal(readers._read_npz(tmp_path / "a.npz")["bias"], values)
    (tmp_path / "a.pdparams").write_bytes(pickle.dumps({"head.bias": bits}))
    assert np.array_equal(read_weights(tmp_path / "a.pdparams").state["head.bias"], values)


# The verb


def test_convert_prints_and_saves_what_became_of_each_array(tmp_path: Path, capfd) -> None:
    source, target = WEIGHTS / FILES["hf_vit"], tmp_path / "out/vit.npz"
    assert main(["convert", "--from", str(source), "--to", str(target), "-o", "model.image_size=20"]) == 0
    said = capfd.readouterr().out
    assert "resampled: pos_embed" in said and "missing: none" in said and "-o model.num_heads=4" in said
    report = json.loads((tmp_path / "out/vit.npz.report.json").read_text())
    assert report["resampled"] == ["pos_embed"] and report["missing"] == report["unexpected"] == []
    assert read_weights(target).state["pos_embed"].shape == (1, 26, 20)


def test_convert_from_a_checkpoint_of_ours_and_back_is_exact(tmp_path: Path, capfd) -> None:
    state = random_state(layer_scale_init=None, representation_size=None)
    shutil.copy(WEIGHTS / FILES["plsc"], tmp_path / "mine.pdparams")
    paddle.save({name: paddle.to_tensor(value) for name, value in state.items()}, str(tmp_path / "mine.pdparams"))
    size = ["--image-size", "12", "16"]
    more = [*size, "-o", "model.num_heads=3"]
    for number, (source, target) in enumerate(
        [("mine.pdparams", "a.npz"), ("a.npz", "b.safetensors"), ("b.safetensors", "c.pdparams")]
    ):
        arguments = ["convert", "--from", str(tmp_path / source), "--to", str(tmp_path / target)]
        assert main([*arguments, *(size if number == 1 else more)]) == 0, capfd.readouterr().err
    again = read_weights(tmp_path / "c.pdparams").state
    assert again.keys() == state.keys() and all(np.array_equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--from", str(WEIGHTS / FILES["timm_vit"]), "--to", "x.npz"], "num_heads"),
        (["--from", str(WEIGHTS / FILES["timm_vit"]), "--to", "x.npz", "-o", "model.num_heads=4"], "--image-size"),
        (["--from", str(WEIGHTS / FILES["timm_deit3"]), "--to", "x.bin"], "--format"),
        (["--from", "nowhere.npz", "--to", "x.npz"], "nowhere.npz"),
        (["--from", str(WEIGHTS / FILES["timm_deit3"]), "--to", ".", "--format", "timm"], "is a folder"),
        (["--from", str(WEIGHTS / FILES["vit_jax_gap"]), "--to", "x.safetensors", "--format", "huggingface", *SIZE],
         "--format timm"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path: Path, monkeypatch, capfd, arguments: list[str], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *arguments]) == 2
    error = capfd.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_unknown_model_of_a_file_is_told_by_its_arrays() -> None:
    config = SMALL.model_copy(update={"register_tokens": 3, "pool": "cls_gap", "class_token_pos_embed": False})
    model = VisionTransformer(config)
    state = fuse_qkv({name: value.numpy() for name, value in model.state_dict().items()})
    told = infer_config(ExternalWeights(state, "ours", {"pool": "cls_gap"}), "x", ["model.num_heads=3"], (12, 16)).model
    wanted = ("width", "depth", "mlp_dim", "patch_size", "num_classes", "representation_size", "register_tokens")
    assert all(
        getattr(told, key) == getattr(config, key) for key in (*wanted, "class_token_pos_embed", "pool", "qkv_bias")
    )


# What a reader's probes found


def test_a_pickle_makes_no_object_of_numpys(tmp_path: Path) -> None:
    """An array of objects made of a file's bytes would end the process."""

    class Forged:
        def __reduce__(self) -> Any:
            return np.ndarray, ((1,), np.dtype("O"), b"A" * 8)

    (tmp_path / "forged.pdparams").write_bytes(pickle.dumps({"head.weight": Forged()}))
    script = f"""
from pathlib import Path
from vit_static.common.errors import WeightsError
from vit_static.weights.formats import read_weights
try:
    read_weights(Path({str(tmp_path / "forged.pdparams")!r}))
except WeightsError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "holds no arrays" in done.stdout, done.stderr


def test_a_pickle_that_is_an_array_is_named(tmp_path: Path) -> None:
    (tmp_path / "odd.pdparams").write_bytes(pickle.dumps(np.zeros(3, np.float32)))
    with pytest.raises(WeightsError, match="not a state dict"):
        read_weights(tmp_path / "odd.pdparams")


@pytest.mark.parametrize("shape", [(1, 20), (1,)])
def test_a_layer_scale_that_does_not_fit_is_an_error(tmp_path: Path, shape: tuple[int, ...]) -> None:
    scale = {"blocks.0.ls1.gamma": np.ones(shape, np.float32)}
    found = read_weights(saved(tmp_path / "x.safetensors", lambda arrays: arrays | scale))
    config = model_of_file("timm_vit")[1]
    with pytest.raises(WeightsError, match=r"ls1\.gamma"):
        convert_state(found, config, "x", InitConfig(head="keep"), (3, 5))


@pytest.mark.parametrize("added", ["fc_norm.weight", "backbone.head.weight"])
def test_two_arrays_for_one_place_are_an_error(tmp_path: Path, added: str) -> None:
    prefix = "backbone." if added.startswith("backbone") else ""
    more = {added: np.ones((7, 20) if prefix else 20, np.float32)}
    path = saved(
        tmp_path / "x.safetensors",
        lambda arrays: {(prefix + key if key != "head.weight" else key): array for key, array in arrays.items()} | more,
    )
    with pytest.raises(WeightsError):
        read_weights(path)


def test_key_and_value_biases_without_a_querys_are_an_error(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "x.safetensors",
        lambda arrays: {key: array for key, array in arrays.items() if not key.endswith("query.bias")},
        "hf_vit",
    )
    with pytest.raises(WeightsError, match="don't belong together"):
        read_weights(path)


def test_another_activation_than_gelu_is_refused(tmp_path: Path) -> None:
    shutil.copy(WEIGHTS / FILES["hf_vit"], tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"hidden_act": "relu"}')
    with pytest.raises(WeightsError, match="hidden_act"):
        read_weights(tmp_path / "model.safetensors")


def test_what_a_program_has_not_is_not_written_for_it(tmp_path: Path) -> None:
    for name, to, said in (
        ("timm_avg_fc_norm", "google", "norm comes after"),
        ("big_vision_gap_sincos", "timm", "fixed"),
        ("timm_dinov2_reg", "google", "LayerScale"),
    ):
        found, config = model_of_file(name)
        with pytest.raises(WeightsError, match=said):
            write_converted(found.state, config, tmp_path / "x", to)


def test_other_heads_are_another_model() -> None:
    """Google's arrays and Hugging Face's config tell how many there are."""
    for name in ("vit_jax", "hf_vit"):
        found, config = model_of_file(name)
        other = config.model_copy(update={"num_heads": 2})
        with pytest.raises(WeightsError, match=r"-o model\.num_heads=4"):
            convert_state(found, other, name, InitConfig(head="keep"), grid_of(config))


def test_small_files_do_not_ask_for_much_memory(tmp_path: Path) -> None:
    """A zip file that grows a thousand times, and a pickle of nine bytes whose memo is to have 2**28 places."""
    np.savez_compressed(tmp_path / "zeros.npz", a=np.zeros(30_000_000, np.float32))
    (tmp_path / "memo.pdparams").write_bytes(b"\x80\x02}r" + struct.pack("<I", 2**28) + b".")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("zeros.npz", "memo.pdparams"):
        with pytest.raises(WeightsError, match=name):
            read_weights(tmp_path / name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_broken_numbers_are_named(tmp_path: Path) -> None:
    broken = {"head.bias": np.array([np.inf] * 7, np.float32)}
    with pytest.raises(WeightsError, match=r"head\.bias holds infinities"):
        read_weights(saved(tmp_path / "x.safetensors", lambda arrays: arrays | broken))


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pdparams").write_bytes(pickle.dumps({"\ud800": 1}, protocol=2))
    with pytest.raises(WeightsError, match="isn't printable text"):
        read_weights(tmp_path / "x.pdparams")


def test_an_embedding_is_resampled_as_asked_for(tmp_path: Path) -> None:
    source = str(WEIGHTS / FILES["hf_vit"])
    for mode in ("bicubic", "bilinear", "antialias"):
        target = tmp_path / f"{mode}.npz"
        more = ["-o", "model.image_size=20", "-o", f"init.pos_embed={mode}"]
        assert main(["convert", "--from", source, "--to", str(target), *more]) == 0
        given, got = read_weights(Path(source)).state["pos_embed"], read_weights(target).state["pos_embed"]
        assert np.array_equal(got, resample_pos_embed(given, (3, 3), (5, 5), mode))


def test_a_square_and_the_models_own_grid_of_as_many_patches_are_not_guessed() -> None:
    config = SMALL.model_copy(update={"image_size": (8, 32)})  # 2 x 8 patches, as many as 4 x 4
    state = random_state(image_size=(8, 32))
    with pytest.raises(WeightsError, match="4x4 patches or for the model's 2x8"):
        init_from(VisionTransformer(config), config, ExternalWeights(state, "test"), "x", InitConfig())
    init_from(VisionTransformer(config), config, ExternalWeights(state, "test"), "x", InitConfig(), (2, 8))
