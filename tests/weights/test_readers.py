"""Reading arrays from files: dtypes, damage, other files, and pickles that would run code or take memory."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.small import ROOT, random_state
from helpers.weight_files import FILES, WEIGHTS, save_changed
from safetensors.numpy import save_file

from vit_static.common.errors import WeightsError
from vit_static.weights.formats import read_weights
from vit_static.weights.load import write_pdparams
from vit_static.weights.readers import read_arrays


def test_bfloat16_is_read(tmp_path: Path) -> None:
    """As torch saves it in safetensors, Paddle in a pickle (its bits), and JAX in an npz (bytes without a dtype)."""
    values = np.array([1.0, -2.5, 3.140625], np.float32)  # exact in bfloat16
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    header = json.dumps({"bias": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bits.tobytes())
    np.savez(tmp_path / "a.npz", bias=bits.view("V2"))
    (tmp_path / "a.pdparams").write_bytes(pickle.dumps({"bias": bits}))
    for name, kind in (("a.safetensors", "safetensors"), ("a.npz", "npz"), ("a.pdparams", "paddle")):
        content = read_arrays(tmp_path / name)
        assert content.container == kind and np.array_equal(content.arrays["bias"], values)


def nested(path: Path, *names: str) -> Path:
    """Write a pickle with the small model's state dict below `names`, beside an optimizer and an average."""
    state, average = random_state(), random_state(seed=1)
    content: dict[str, Any] = {f"module.{name}": array for name, array in state.items()}
    for name in reversed(names):
        content = {name: content}
    others = {"epoch": 3, "optimizer": {"moment": {"a": np.ones(3, np.float32)}}, "model_ema": average}
    path.write_bytes(pickle.dumps(content | others))
    return path


@pytest.mark.parametrize("names", [("state_dict",), ("model",), ("teacher",), ("model", "state_dict")], ids="/".join)
def test_a_state_dict_inside_another_dict_is_found(tmp_path: Path, names: tuple[str, ...]) -> None:
    """As training scripts save it, with the prefix of data parallelism; the rest is listed in the report."""
    path = nested(tmp_path / "checkpoint.pdparams", *names)
    for ema in (False, True):
        external, expected = read_weights(path, ema=ema), random_state(seed=int(ema))
        assert external.state.keys() == expected.keys()
        assert all(np.array_equal(external.state[name], expected[name]) for name in expected)
        assert {"epoch", "optimizer"} < external.dropped.keys()


def test_a_file_without_an_average_has_none_to_select(tmp_path: Path) -> None:
    write_pdparams(random_state(), tmp_path / "x.pdparams")
    for path in (tmp_path / "x.pdparams", WEIGHTS / FILES["timm_vit"]):
        with pytest.raises(WeightsError, match="leave --ema out"):
            read_weights(path, ema=True)


# Other and damaged files


def test_pytorchs_own_files_are_refused_with_the_remedy(tmp_path: Path) -> None:
    """A zip file, as torch.save writes today, and the pickle that it wrote before."""
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
    "an empty zip": lambda path: zipfile.ZipFile(path, "w").close(),
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


@pytest.mark.parametrize(
    "content",
    [b"", b"not a pickle", pickle.dumps([1, 2]), pickle.dumps({}), pickle.dumps({"a": 1})],
    ids=["empty", "text", "list", "no keys", "no arrays"],
)
def test_files_without_a_state_dict_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd.pdparams").write_bytes(content)
    with pytest.raises(WeightsError, match=r"odd\.pdparams") as error:
        read_weights(tmp_path / "odd.pdparams")
    assert "\n" not in str(error.value)


def test_truncated_file(tmp_path: Path) -> None:
    write_pdparams(random_state(), tmp_path / "model.pdparams")
    content = (tmp_path / "model.pdparams").read_bytes()
    (tmp_path / "model.pdparams").write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match="not a Paddle state dict"):
        read_weights(tmp_path / "model.pdparams")


def test_infinities_are_named(tmp_path: Path) -> None:
    infinite = {"head.bias": np.array([np.inf] * 7, np.float32)}
    with pytest.raises(WeightsError, match=r"head\.bias holds infinities"):
        read_weights(save_changed(tmp_path / "x.safetensors", lambda arrays: arrays | infinite))


def test_a_name_that_is_not_printable_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pdparams").write_bytes(pickle.dumps({"\ud800": 1}, protocol=2))
    with pytest.raises(WeightsError, match="isn't printable text"):
        read_weights(tmp_path / "x.pdparams")


# Pickles


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    marker, bad = tmp_path / "ran", tmp_path / "bad.pdparams"
    bad.write_bytes(pickle.dumps({"head.weight": Malicious(marker)}))
    with pytest.raises(WeightsError, match=r"posix\.system"):
        read_weights(bad)
    assert not marker.exists()


def test_a_forged_array_does_not_end_the_process(tmp_path: Path) -> None:
    """NumPy would take the file's bytes for pointers to objects."""

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


def test_a_pickled_array_is_not_a_state_dict(tmp_path: Path) -> None:
    (tmp_path / "odd.pdparams").write_bytes(pickle.dumps(np.zeros(3, np.float32)))
    with pytest.raises(WeightsError, match="not a state dict"):
        read_weights(tmp_path / "odd.pdparams")


def test_small_files_do_not_take_much_memory(tmp_path: Path) -> None:
    """A zip file that expands a thousandfold, a memo with 2**28 entries, and a bytearray of 2**30 bytes."""
    np.savez_compressed(tmp_path / "zeros.npz", a=np.zeros(30_000_000, np.float32))
    (tmp_path / "memo.pdparams").write_bytes(b"\x80\x02}r" + struct.pack("<I", 2**28) + b".")
    (tmp_path / "bytearray.pdparams").write_bytes(b"\x80\x05\x96" + struct.pack("<Q", 2**30) + b".")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("zeros.npz", "memo.pdparams", "bytearray.pdparams"):
        with pytest.raises(WeightsError, match=name):
            read_weights(tmp_path / name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
