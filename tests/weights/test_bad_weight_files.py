"""Damaged and malicious weight files are read, or refused in one line."""

from __future__ import annotations

import functools
import io
import json
import math
import os
import pickle
import pickletools
import resource
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.bad_input import Trial, cases, damaged, nested, pytestmark, values  # noqa: F401
from helpers.small import REFERENCE
from hypothesis import given
from hypothesis import strategies as st

from vit_static.config.schema import InitConfig
from vit_static.weights.convert import convert_state
from vit_static.weights.formats import ExternalWeights
from vit_static.weights.infer import infer_config
from vit_static.weights.readers import read_arrays
from vit_static.weights.source import load_weights

WEIGHTS = [
    REFERENCE / "weights" / name
    for name in (
        "timm_vit.safetensors",
        "hf_vit/model.safetensors",
        "dinov3.safetensors",
        "eva02.safetensors",
        "timm_mixed_ape.safetensors",
        "rope_vit5.safetensors",
        "vit_jax.npz",
        "big_vision_scan.npz",
        "plsc.pdparams",
        "plsc_fp16.pdparams",
        "timm_dinov2_reg.safetensors",
        "timm_siglip.safetensors",
        "open_clip/open_clip_model.safetensors",
        "hf_clip/model.safetensors",
        "big_vision_siglip.npz",
    )
]
SUFFIXES = [".pdparams", ".npz", ".safetensors", ".pt", ""]


@pytest.fixture(scope="module")
def accepts_weights(trial: Trial) -> Iterator[Callable[..., None]]:
    """accepts_weights(kind, content, suffix): convert a file with this content, or see it refused in one line.

    No other file appears, and all cases together take less than 500 MB of memory.
    """
    folder = trial.folder / "weights"
    folder.mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def accepts(kind: str, content: bytes, suffix: str = ".pdparams") -> None:
        path = folder / f"weights{suffix}"
        path.write_bytes(content)
        try:
            with trial.of(kind, f"weights{suffix}"):
                external = load_weights(path).external
                assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in external.state.values())
                config = infer_config(external, str(path), *size_and_heads(external))
                convert_state(external, config.model, str(path), InitConfig(head="keep"), None)
        finally:
            path.unlink()
        assert not list(folder.iterdir())

    previous = Path.cwd()
    os.chdir(folder)  # where a pickle would create its file
    yield accepts
    os.chdir(previous)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def size_and_heads(external: ExternalWeights) -> tuple[list[str], tuple[int, int]]:
    """Return what most of the files don't determine; those of models with rotary positions have patches of 3."""
    patches = external.state.get("patch_embed.proj.weight", np.zeros(0))
    has_rope = "rope" in external.model_hints or patches.shape[2:] == (3, 3)
    return (["model.num_heads=2"], (9, 15)) if has_rope else (["model.num_heads=4"], (12, 20))


@cases(150)
@given(
    st.sampled_from([b"", b"PK\x03\x04", b"\x80\x04", b"\x80\x02}", struct.pack("<Q", 8) + b"{", b"\x93NUMPY"]),
    st.binary(max_size=200),
    st.sampled_from(SUFFIXES),
)
def test_weights_of_any_bytes(accepts_weights, beginning: bytes, content: bytes, suffix: str) -> None:
    accepts_weights("weights: bytes", beginning + content, suffix)


@cases(250)
@given(st.sampled_from(WEIGHTS), st.data())
def test_damaged_weights(accepts_weights, source: Path, data: st.DataObject) -> None:
    accepts_weights("weights: damaged", damaged(content_of(source), data.draw), source.suffix)


@functools.cache
def content_of(path: Path) -> bytes:
    return path.read_bytes()


@functools.cache
def arrays_of(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".npz":
        return dict(np.load(path))
    return {name: array for name, array in read_arrays(path).arrays.items() if array is not None}


DTYPES = ["f2", "f4", "f8", ">f4", "i1", "i4", "i8", "u2", "?", "c8", "S3", "U2", "M8[s]", "V2"]
shapes = (
    st.lists(st.sampled_from([0, 1, 2, 3, 4, 7, 20, 48]), max_size=5)
    .map(tuple)
    .filter(lambda shape: math.prod(shape) < 100_000)
)


@cases(250)
@given(st.sampled_from(WEIGHTS), st.data())
def test_weights_with_other_shapes_dtypes_and_names(accepts_weights, source: Path, data: st.DataObject) -> None:
    arrays = dict(arrays_of(source))
    names = sorted(arrays)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(names))
        array = arrays.pop(name, np.zeros(3, np.float32))
        if data.draw(st.booleans()):
            array = np.zeros(data.draw(shapes), np.float32)
        if array.dtype.kind == "f" and data.draw(st.booleans()):
            array = array.astype(data.draw(st.sampled_from(DTYPES[:9])))
        elif data.draw(st.booleans()):
            array = np.zeros(array.shape, data.draw(st.sampled_from(DTYPES)))
        digits = data.draw(st.sampled_from(["0", "1", "7", "9999", "99999", "x"]))
        for other in {
            "same": [name],
            "none": [],
            "number": [name.replace("0", digits)],
            "odd": [data.draw(st.text(max_size=10))],
            "twice": [name, f"module.{name}"],
        }[data.draw(st.sampled_from(["same", "same", "none", "number", "odd", "twice"]))]:
            arrays[other] = array
    accepts_weights("weights: other arrays", encode(arrays, source.suffix), source.suffix)


def encode(arrays: dict[str, np.ndarray], suffix: str) -> bytes:
    """Return a weight file, in which names may occur twice and dtypes may be wrong."""
    if suffix == ".npz":
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, array in arrays.items():
                member = io.BytesIO()
                np.save(member, array)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy".replace("\0", "0")), member.getvalue())
        return file.getvalue()
    if suffix == ".safetensors":
        header, start = {}, 0
        names = {"f2": "F16", "f4": "F32", "f8": "F64", "i4": "I32", "i8": "I64", "u2": "BF16", "i1": "I8"}
        for name, array in arrays.items():
            dtype = names.get(array.dtype.str[1:], "F32")
            header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, start + array.nbytes]}
            start += array.nbytes
        return safetensors(header, b"".join(array.tobytes() for array in arrays.values()))
    return pickle.dumps(arrays, protocol=4)


def safetensors(header: Any, content: bytes = b"\0" * 64, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + content


offsets = st.sampled_from([0, 1, 4, 16, 48, 64, 65, 2**31, 2**63 - 1, 2**63, 2**64, -1, 1.5, "4", None])
tensors = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F8_E4M3", "BOOL", "I64", "f32", "F4", "C64", 7, None]),
        "shape": st.lists(st.sampled_from([0, 1, 4, 12, 2**31, 2**62, 2**64, -1, "3"]), max_size=4) | st.just("4"),
        "data_offsets": st.lists(offsets, min_size=1, max_size=3),
    }
)
MALICIOUS_HEADERS = {
    "any length": lambda n: safetensors({"a": {}}, length=n),
    "nested lists": lambda n: safetensors(b'{"a":' + b"[" * min(n, 100_000)),
    "nested mappings": lambda n: safetensors(b'{"a":' * min(n, 20_000)),
    "spaces": lambda n: safetensors(b"{" + b" " * min(n, 10**6) + b"}"),
    "a large array": lambda n: safetensors({"a": {"dtype": "F32", "shape": [n], "data_offsets": [0, 4 * n]}}),
    "an empty array of a large shape": lambda n: safetensors(
        {"a": {"dtype": "F32", "shape": [0, n], "data_offsets": [0, 0]}}, b""
    ),
    "many arrays": lambda n: safetensors(
        {f"a{i}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for i in range(min(n, 1000))}, b"\0" * 4
    ),
}


@cases(100)
@given(st.dictionaries(st.text(max_size=8) | st.just("__metadata__"), tensors | values.map(repr), max_size=4))
def test_safetensors_headers(accepts_weights, header: dict[str, Any]) -> None:
    accepts_weights("weights: safetensors headers", safetensors(header), ".safetensors")


@pytest.mark.parametrize("size", [0, 1, 2**20, 10**8 - 1, 10**8, 2**31, 2**40, 2**63 - 1])
def test_malicious_safetensors_headers(accepts_weights, size: int) -> None:
    for make in MALICIOUS_HEADERS.values():
        accepts_weights("weights: safetensors headers", make(size), ".safetensors")


def npz(members: Sequence[tuple[str, bytes]], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return file.getvalue()


def npy(header: str, content: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin-1", "replace") + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text) % 65536) + text + content


member_names = st.sampled_from(
    ["../canary", "/tmp/canary_of_a_test", "a.npy", "a", "x/../../canary.npy", "C:\\a.npy", ""]
)
npy_headers = st.builds(
    "{{'descr': {}, 'fortran_order': {}, 'shape': {}}}".format,
    st.sampled_from(["'<f4'", "'|O'", "'<f2'", "[('a', '<f4')]", "'<V2'", "__import__('os')", "'<U9'", "'|S0'", "7"]),
    st.sampled_from(["False", "True", "1", "None"]),
    st.sampled_from(
        ["(4,)", "()", "(0,)", f"({2**33},)", f"({2**62}, 8)", "(-1,)", "4", "(2, 2)", "(" * 300, "(1,) * 9"]
    ),
)


@cases(150)
@given(
    st.lists(
        st.tuples(
            member_names | st.text(max_size=9),
            st.builds(npy, npy_headers, st.binary(max_size=20), st.sampled_from([b"\1\0", b"\3\0", b"\t\0"]))
            | st.binary(max_size=30),
        ),
        max_size=3,
    ),
    st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]),
)
def test_npz_members(accepts_weights, members: list[tuple[str, bytes]], compression: int) -> None:
    names = [(name.replace("\0", "0").encode("utf-8", "replace").decode(), content) for name, content in members]
    accepts_weights("weights: npz members", npz(names, compression), ".npz")


def test_zip_bombs(accepts_weights) -> None:
    large = npy("{'descr': '<f2', 'fortran_order': False, 'shape': (40000000,)}", bytes(80_000_000))
    for content in (
        npz([("params/Transformer/encoderblock/x.npy", large), ("params/embedding/kernel.npy", large[:1])]),
        npz([("embedding/kernel.npy", large), ("Transformer/encoderblock/x.npy", large)]),
        npz([("a.npy", large)] * 2),
        npz([("a.npy", bytes(500_000_000))]),
        npz([(f"{n}.npy", b"") for n in range(20_000)]),
        npz([("a.npy", npz([("b.npy", npz([("c.npy", large)]))]))]),
    ):
        accepts_weights("weights: zip bombs", content, ".npz")


GLOBALS = [
    ("os", "system"), ("posix", "system"), ("subprocess", "Popen"), ("builtins", "exec"), ("builtins", "eval"),
    ("builtins", "open"), ("builtins", "getattr"), ("builtins", "__import__"), ("__builtin__", "eval"),
    ("pty", "spawn"),
    ("pathlib", "Path.touch"), ("numpy", "ndarray"), ("numpy", "dtype"), ("numpy", "memmap"), ("numpy", "load"),
    ("numpy.core.multiarray", "_reconstruct"), ("numpy", "f2py.crackfortran.myeval"), ("operator", "attrgetter"),
    ("collections", "OrderedDict"), ("collections", "OrderedDict.__init__.__globals__"), ("functools", "partial"),
    ("_codecs", "encode"),
    ("paddle", "load"), ("torch", "load"), ("vit_static.weights.readers", "Path"), ("webbrowser", "open"), ("", ""),
]  # fmt: skip
pickled_arguments = st.sampled_from(
    [("touch canary",), ("open('canary', 'w')",), ("canary", "w"), (), ("",), ((1,), "O", b"A" * 8), ((2**40,), "<f8")]
)


def pickled_call(module: str, name: str, arguments: tuple[Any, ...], protocol: int) -> bytes:
    """Return a pickle of a state dict with the result of module.name(*arguments) in it."""
    pickled = pickle.dumps(arguments, protocol)[2 if protocol >= 2 else 0 : -1]
    return b"\x80\x02}X\x04\0\0\0head" + f"c{module}\n{name}\n".encode() + pickled + b"Rs."


@cases(150)
@given(
    st.sampled_from(GLOBALS),
    pickled_arguments,
    st.sampled_from([0, 1, 2]),
    st.sampled_from([b"", b"}b", b"\x81", b"2"]),
)
def test_pickles_that_call_functions(
    accepts_weights, called: tuple[str, str], arguments: Any, protocol: int, more: bytes
) -> None:
    content = pickled_call(*called, arguments, protocol)
    accepts_weights("weights: pickles that run code", content[:-2] + more + content[-2:])


OPCODES = [opcode for opcode in pickletools.opcodes if opcode.name not in ("STOP", "FRAME")]
known_names = st.sampled_from(
    [
        b"ccollections\nOrderedDict\n",
        b"cnumpy\nndarray\n",
        b"cnumpy\ndtype\n",
        b"cnumpy.core.multiarray\n_reconstruct\n",
        b"c_codecs\nencode\n",
    ]
)


@st.composite
def opcodes(draw: Callable[[Any], Any]) -> bytes:
    """Draw one opcode and its argument, often a small number, so that it refers to something that exists."""
    if draw(st.integers(0, 3)) == 0:
        return draw(known_names)
    opcode = draw(st.sampled_from(OPCODES))
    code, argument = opcode.code.encode("latin-1"), opcode.arg
    if argument is None:
        return code
    if argument.n >= 0:
        number = draw(st.sampled_from([0, 1, 2, 3, 255, 2**31 - 1, 2**32 - 1, 2**62]))
        return code + (number % 256**argument.n).to_bytes(argument.n, "little")
    text = draw(st.sampled_from([b"", b"a", b"1", b"0", b"f4", b"<", b"touch canary"]))
    width = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4}.get(argument.n)
    width = {pickletools.TAKEN_FROM_ARGUMENT4U: 4, pickletools.TAKEN_FROM_ARGUMENT8U: 8}.get(argument.n, width)
    if width is None:
        return code + text + b"\n" * (2 if "pair" in argument.name else 1)
    length = draw(st.sampled_from([len(text)] * 6 + [2**31 - 1, 2**32 - 1, 2**63 - 1]))
    return code + (length % 256**width).to_bytes(width, "little") + text


@cases(400)
@given(st.lists(opcodes(), max_size=25).map(b"".join), st.sampled_from([b"", b"}", b"}(", b"]", b"(", b"}X\1\0\0\0a"]))
def test_pickles_of_any_opcodes(accepts_weights, content: bytes, start: bytes) -> None:
    accepts_weights("weights: pickles of any opcodes", b"\x80\x04" + start + content + b".")


PICKLE_BOMBS = {
    "a nested value": b"}X\1\0\0\0a" + nested(b"K\1", 60) + b"s.",
    "a nested shape": b"}X\1\0\0\0acnumpy\nndarray\n)R(K\1" + nested(b"K\1", 60) + b"NNNtbs.",
    "a nested dtype": b"cnumpy\ndtype\n" + nested(b"K\1", 60) + b"R.",
    "a list that contains itself": b"]q\0h\0a.",
    "bytes of 4 GB": b"B\xff\xff\xff\xff.",
    "bytes of 2**62": b"\x8e" + struct.pack("<Q", 2**62) + b".",
    "a bytearray of 4 GB": b"\x96" + struct.pack("<Q", 2**32) + b".",
    "text of 4 GB": b"X\xff\xff\xff\xff.",
    "an integer of 4 GB": b"\x8b\xff\xff\xff\x7f.",
    "a frame of 2**62": b"\x95" + struct.pack("<Q", 2**62) + b"}.",
    "a frame of 4 GB": b"\x95" + struct.pack("<Q", 2**32) + b"}.",
    "a memo of 2**32": b"}r\xff\xff\xff\xff.",
    "deep lists": b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep tuples": b"}X\1\0\0\0a)" + b"\x85" * 100_000 + b"s.",
    "a long integer": b"}X\1\0\0\0aI" + b"9" * 100_000 + b"\ns.",
    "a long name": b"c" + b"x" * 100_000 + b"\ny\n.",
    "an array of 2**60": b"}X\1\0\0\0acnumpy\nndarray\n)R(K\1\x8a\x08" + struct.pack("<Q", 2**60)
    + b"\x85cnumpy\ndtype\nX\2\0\0\0f4\x85R\x89C\4\0\0\0\0tbs.",
    "an extension code": b"\x82\1.",
    "a persistent id": b"Pcanary\n.",
}  # fmt: skip


@pytest.mark.timeout(20)
@pytest.mark.parametrize("content", PICKLE_BOMBS.values(), ids=PICKLE_BOMBS)
def test_malicious_pickles(accepts_weights, content: bytes) -> None:
    accepts_weights("weights: malicious pickles", b"\x80\x04" + content)


@cases(60)
@given(st.sampled_from(["config.yaml", "class_names.txt", "config.json"]), st.data())
def test_files_next_to_weights(trial: Trial, name: str, data: st.DataObject) -> None:
    """A run's config and class names, and Hugging Face's config.json."""
    folder = trial.folder / "next_to_weights"
    folder.mkdir(exist_ok=True)
    for leftover in folder.iterdir():
        leftover.unlink()
    path = folder / "model.safetensors"
    path.write_bytes(content_of(WEIGHTS[1]))
    hf_configs = st.fixed_dictionaries({}, optional={
        "num_attention_heads": st.sampled_from([4, 0, -1, True, 10**400, "4", None, 3]),
        "layer_norm_eps": st.sampled_from([1e-6, -1.0, 1e400, 0.0, float("nan"), "x"]),
        "hidden_act": st.sampled_from(["gelu", "gelu_new", "relu", 7, None, ["gelu"], {}, "x" * 1000]),
    }).map(json.dumps)  # fmt: skip
    content = data.draw(st.binary(max_size=30) | hf_configs.map(str.encode) | st.just(b"[" * 100_000))
    (folder / name).write_bytes(content)
    with trial.of("files next to weights", "next_to_weights" if name == "config.yaml" else ""):
        loaded = load_weights(path)
        config = loaded.config or infer_config(loaded.external, str(path), [], None)
        convert_state(loaded.external, config.model, str(path), InitConfig(head="keep"), None)
