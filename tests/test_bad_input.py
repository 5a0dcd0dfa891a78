"""Whatever lies in a config, a file of weights, a data set or a model's folder: it is read, or refused in one line.

Hypothesis makes the cases, the same ones every time. For a longer hunt, BAD_INPUT_TIMES=10 makes ten times as many.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
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
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import REFERENCE

from vit_static import config as config_module
from vit_static import convert, formats
from vit_static.checkpoint import load_weights
from vit_static.config import Config, InitConfig, UserError, load
from vit_static.weight_files import read_arrays

pytestmark = [pytest.mark.reliability, pytest.mark.slow]

LONGEST_MESSAGE = 400  # without the folder that the test is in


def cases(count: int) -> Callable[[Any], Any]:
    """How many hypothesis makes."""
    return settings(
        max_examples=count * int(os.environ.get("BAD_INPUT_TIMES", "1")),
        deadline=None,
        derandomize=True,
        print_blob=False,
        report_multiple_bugs=False,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class Trial:
    """Counts a case, and holds what refuses it to a message of one line that names what it should."""

    def __init__(self, count: Callable[..., None], folder: Path) -> None:
        self._count, self.folder = count, folder

    @contextlib.contextmanager
    def of(self, kind: str, *names: str) -> Iterator[None]:
        """What may be refused; `names`: what the message must have one of."""
        self._count(kind)
        outcome = "accepted"
        try:
            yield
        except UserError as error:
            outcome = "refused"
            message = str(error)
            is_clear = (
                (message.isprintable() and message.strip() == message != "")
                and len(message.replace(str(self.folder), "")) <= LONGEST_MESSAGE
                and (not names or any(name in message for name in names))
            )
            if not is_clear:
                raise AssertionError(f"{names}: {message[:1000]!r}") from None
        self._count(kind, 1, outcome)


@pytest.fixture(scope="module")
def trial(tally: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Trial:
    return Trial(tally, tmp_path_factory.mktemp("bad"))


# -- configs -----------------------------------------------------------------------------------------------------------

SECTIONS = {
    name: field.annotation.model_fields
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, config_module.Section)
}
KEYS = [(name, field.alias or key) for name, fields in SECTIONS.items() for key, field in fields.items()]
KEYS += [(name,) for name in Config.model_fields]

ODD_TEXTS = [
    *("", " ", "../x", "..", ".", "/etc/passwd", "a/b", "a\\b", "-rf", "~", "x" * 300, "é" * 150, "\0", "\x1b[2J", "\u202e"),
    *("007", "7", "1e3", "1_000", "0x10", "yes", "null", "=", "2024-01-01", "nan", ".inf", "B/16", "auto", "\ud800", "\udcff"),
    *("%s{}", "${HOME}", "!!python/object/apply:os.system ['true']", "*a", "&a", "a: b", "[", "}", "#", "@", "`", "<<"),
]
ODD_NUMBERS = [0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**400, 0.0, -0.0, 5e-324, 1e308, float("nan"), float("inf")]
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 9)
    | st.floats()
    | st.floats(0.0, 1.0)
    | st.sampled_from(ODD_NUMBERS)
    | st.sampled_from(ODD_TEXTS[:27] + ODD_TEXTS[29:])
    | st.text(max_size=20)
    | st.binary(max_size=5)
    | st.dates()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
yaml_texts = st.text(st.sampled_from("ab01 \n\t:-[]{},&*!|>'\"#%@`?<=~.\\é\x00\x85\ufeff\U0001f600"), max_size=60)
BOMBS = {
    "laughs": "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)),
    "laughs of a key": "".join(f"x{n}: &a{n} {['[x]', f'[*a{n - 1}, *a{n - 1}]'][n > 0]}\n" for n in range(60)) + "name: *a59",
    "laughs of a section": "optim: {betas: &a [&b [&c [1, 1], *c], *b], lr: *a}",
    "merges": "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 60)),
    "itself": "optim: &a {lr: 1, betas: *a}",
    "itself in a list": "amp: {white_list: &a [*a, *a]}",
    "itself merged": "optim: &a {<<: *a, lr: 1}",
    "deep lists": "optim: " + "[" * 5000,
    "deep closed lists": "name: " + "[" * 300 + "]" * 300,
    "deep mappings": "".join(" " * n + "a:\n" for n in range(600)),
    "long": "# " + "x" * 300_000,
    "long name": "name: " + "x" * 100_000,
    "long key": "x" * 100_000 + ": 1",
    "long list": "amp: {white_list: [" + "1, " * 20_000 + "]}",
    "hexadecimal": "seed: 0x" + "f" * 9000,
    "hexadecimal classes": "model: {num_classes: 0x" + "f" * 9000 + "}",
    "digits": "seed: " + "1" * 5000,
    "sexagesimal": "optim: {lr: 1" + ":59" * 400 + ".0}",
    "code": "name: !!python/object/apply:os.system ['touch canary']",
    "code of a new kind": "name: !!python/object/new:os.system ['touch canary']",
    "a module": "!!python/module:antigravity",
    "tags": "a: !!int x\nb: !!float y\nc: !!bool z\nd: !!timestamp t",
    "sets": "name: !!set {a, b}",
    "documents": "seed: 1\n---\nseed: 2",
    "a directive": "%YAML 9.9\n---\nseed: 1",
    "NUL": "name: 'a\0b'",
    "NUL escaped": 'name: "a\\0b"',
    "a surrogate": 'output_dir: "\\ud800"',
    "escapes": 'name: "\\e[31mred"',
    "a list": "[1, 2]",
    "a scalar": "7",
}  # fmt: skip


@pytest.fixture(scope="module")
def accepts_config(trial: Trial) -> Callable[..., None]:
    """accepts_config(kind, content, overrides, names...): one case. What loads is written and loads again, equal."""
    path = trial.folder / "run.yaml"

    def accepts(kind: str, content: bytes, overrides: Sequence[str] = (), *names: str) -> None:
        path.write_bytes(content)
        with trial.of(kind, *names):
            config = load(path, overrides)
            config_module.dump(config, trial.folder / "again.yaml")
            assert load(trial.folder / "again.yaml") == config
            assert config.run_dir.parent == Path(config.output_dir)
            os.fsencode(config.run_dir)
            config_module.total_steps(config.train, 1000, config.data.global_batch_size)
            config_module.warmup_steps(config.schedule, 1000, config.data.global_batch_size)

    return accepts


@cases(300)
@given(st.dictionaries(st.sampled_from(KEYS), values, min_size=1, max_size=3), st.booleans())
def test_configs_with_any_values(accepts_config, changed: dict[tuple[str, ...], Any], flow: bool) -> None:
    document: dict[str, Any] = {}
    for key, value in changed.items():
        if len(key) == 1:
            document[key[0]] = value
        elif isinstance(document.setdefault(key[0], {}), dict):
            document[key[0]][key[1]] = value
    text = yaml.safe_dump(document, default_flow_style=flow, allow_unicode=True)
    accepts_config("config files: values", text.encode("utf-8", "surrogatepass"), (), "run.yaml")


@cases(200)
@given(yaml_texts.map(str.encode) | st.binary(max_size=60) | st.text(max_size=30).map(lambda text: text.encode("utf-16")))
def test_configs_of_any_bytes(accepts_config, content: bytes) -> None:
    accepts_config("config files: bytes", content, (), "run.yaml")


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_configs_that_mean_harm(accepts_config, trial: Trial, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trial.folder)
    accepts_config("config files: bombs", text.encode("utf-8", "surrogatepass"), (), "run.yaml")
    assert not (trial.folder / "canary").exists()


@cases(100)
@given(st.sampled_from(KEYS), st.booleans())
def test_a_key_that_stands_twice_is_refused(trial: Trial, key: tuple[str, ...], of_override: bool) -> None:
    once = f"{key[-1]}: 1"
    nested = f"{key[0]}: {{{once}, x: 2, {once}}}" if len(key) == 2 else f"{once}\nx: 2\n{once}"
    path = trial.folder / "run.yaml"
    path.write_text("" if of_override else nested)
    with trial.of("config files: keys twice", f"line 1: the key '{key[-1]}' is there twice", "line 3: the key"):
        load(path, [f"optim={{{once}, {once}}}"] if of_override else [])
        raise AssertionError(nested)


@cases(300)
@given(
    st.lists(
        st.builds(
            "{}={}".format,
            st.sampled_from(KEYS).map(".".join) | st.text(max_size=8) | st.sampled_from(["", ".", "a..b", "name.x"]),
            st.sampled_from(ODD_TEXTS) | st.text(max_size=12) | yaml_texts | st.sampled_from(ODD_NUMBERS).map(str),
        )
        | st.text(max_size=12),
        min_size=1,
        max_size=3,
    )
)
def test_overrides(accepts_config, overrides: list[str]) -> None:
    accepts_config("overrides", b"seed: 1", overrides, "-o ", "run.yaml")


@pytest.mark.parametrize("text", ["7", "007", "1e3", "1.50", "0x10", "1_000", "2024-01-01", "-7x"[1:]])
def test_a_name_may_be_a_number_and_stays_as_it_is_written(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(f"name: {text}\ndata: {{root: {text}}}")
    for config in (load(tmp_path / "run.yaml"), load(None, [f"name={text}", f"data.root={text}"])):
        assert (config.name, config.data.root) == (text, text)


def test_an_alias_is_not_overridden_with_its_section(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("checkpoint: &a {every_steps: 3}\nlog: *a")
    config = load(tmp_path / "run.yaml", ["log.every_steps=5"])
    assert (config.checkpoint.every_steps, config.log.every_steps) == (3, 5)


# -- files of weights --------------------------------------------------------------------------------------------------

WEIGHTS = [
    REFERENCE / "weights" / name
    for name in ("timm_vit.safetensors", "hf_vit/model.safetensors", "vit_jax.npz", "big_vision_scan.npz", "plsc.pdparams")
] + [REFERENCE / "weights" / "plsc_fp16.pdparams", REFERENCE / "weights" / "timm_dinov2_reg.safetensors"]
SUFFIXES = [".pdparams", ".npz", ".safetensors", ".pt", ""]


def damaged(content: bytes, draw: Callable[[Any], Any]) -> bytes:
    """Cut off, with bits flipped, with a stretch set to one value or put elsewhere."""
    harm, size = draw(st.sampled_from(["cut", "flip", "flip at the start", "fill", "move", "add"])), len(content)
    changed = bytearray(content)
    if size == 0 or harm == "cut":
        return content[: draw(st.integers(0, max(size - 1, 0)))]
    start = draw(st.integers(0, size - 1))
    stop = min(start + draw(st.integers(1, 64)), size)
    if harm.startswith("flip"):
        last = size - 1 if harm == "flip" else min(size - 1, 400)
        for place in draw(st.lists(st.integers(0, last), min_size=1, max_size=8)):
            changed[place] ^= 1 << draw(st.integers(0, 7))
    elif harm == "fill":
        changed[start:stop] = bytes([draw(st.sampled_from([0, 255, 127, 48]))]) * (stop - start)
    elif harm == "move":
        to = draw(st.integers(0, size - 1))
        changed[to:to] = changed[start:stop]
    else:
        changed += draw(st.binary(min_size=1, max_size=50))
    return bytes(changed)


@pytest.fixture(scope="module")
def accepts_weights(trial: Trial) -> Iterator[Callable[..., None]]:
    """accepts_weights(kind, content, suffix): one case, all the way into a model. No file appears, and little memory."""
    folder = trial.folder / "weights"
    folder.mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def accepts(kind: str, content: bytes, suffix: str = ".pdparams") -> None:
        path = folder / f"weights{suffix}"
        path.write_bytes(content)
        with trial.of(kind, f"weights{suffix}"):
            found = load_weights(path).found
            assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in found.state.values())
            config = convert.config_of(found, str(path), ["model.num_heads=4"], (12, 20))
            convert.converted(found, config.model, str(path), InitConfig(head="keep"), None)
        path.unlink()
        assert not list(folder.iterdir())

    here = Path.cwd()
    os.chdir(folder)
    yield accepts
    os.chdir(here)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


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
    accepts_weights("weights: damaged", damaged(contents(source), data.draw), source.suffix)


@functools.cache
def contents(path: Path) -> bytes:
    return path.read_bytes()


@functools.cache
def arrays_of(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".npz":
        return dict(np.load(path))
    found = read_arrays(path)[1]
    return {name: array for name, array in found.items() if array is not None}


DTYPES = ["f2", "f4", "f8", ">f4", "i1", "i4", "i8", "u2", "?", "c8", "S3", "U2", "M8[s]", "V2"]
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 7, 20, 48]), max_size=5).map(tuple)


@cases(250)
@given(st.sampled_from(WEIGHTS), st.data())
def test_weights_of_other_shapes_kinds_and_names(accepts_weights, source: Path, data: st.DataObject) -> None:
    arrays = dict(arrays_of(source))
    names = sorted(arrays)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(names))
        array = arrays.pop(name, np.zeros(3, np.float32))
        if data.draw(st.booleans()):
            array = np.zeros(data.draw(shapes), np.float32)
        if data.draw(st.booleans()):
            array = array.astype(np.float32).astype(data.draw(st.sampled_from(DTYPES[:9])))
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
    accepts_weights("weights: other arrays", written(arrays, source.suffix), source.suffix)


def written(arrays: dict[str, np.ndarray], suffix: str) -> bytes:
    if suffix == ".npz":
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, array in arrays.items():
                of_one = io.BytesIO()
                np.save(of_one, array)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy".replace("\0", "0")), of_one.getvalue())
        return file.getvalue()
    if suffix == ".safetensors":
        header, place = {}, 0
        for name, array in arrays.items():
            names = {"f2": "F16", "f4": "F32", "f8": "F64", "i4": "I32", "i8": "I64", "u2": "BF16", "i1": "I8"}
            kind = names.get(array.dtype.str[1:], "F32")
            header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [place, place + array.nbytes]}
            place += array.nbytes
        return safetensors(header, b"".join(array.tobytes() for array in arrays.values()))
    return pickle.dumps(arrays, protocol=2)


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
HEADERS = {
    "of any length": lambda n: safetensors({"a": {}}, length=n),
    "in lists": lambda n: safetensors(b'{"a":' + b"[" * min(n, 100_000)),
    "in mappings": lambda n: safetensors(b'{"a":' * min(n, 20_000)),
    "of spaces": lambda n: safetensors(b"{" + b" " * min(n, 10**6) + b"}"),
    "of an array of that size": lambda n: safetensors({"a": {"dtype": "F32", "shape": [n], "data_offsets": [0, 4 * n]}}),
    "of nothing of that size": lambda n: safetensors(
        {"a": {"dtype": "F32", "shape": [0, n], "data_offsets": [0, 0]}}, b""
    ),
    "of many": lambda n: safetensors(
        {f"a{i}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for i in range(min(n, 1000))}, b"\0" * 4
    ),
}


@cases(100)
@given(st.dictionaries(st.text(max_size=8) | st.just("__metadata__"), tensors | values.map(repr), max_size=4))
def test_safetensors_headers(accepts_weights, header: dict[str, Any]) -> None:
    accepts_weights("weights: safetensors headers", safetensors(header), ".safetensors")


@pytest.mark.parametrize("size", [0, 1, 2**20, 10**8 - 1, 10**8, 2**31, 2**40, 2**63 - 1])
def test_safetensors_headers_that_mean_harm(accepts_weights, size: int) -> None:
    for make in HEADERS.values():
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


member_names = st.sampled_from(["../canary", "/tmp/canary_of_a_test", "a.npy", "a", "x/../../canary.npy", "C:\\a.npy", ""])
npy_headers = st.builds(
    "{{'descr': {}, 'fortran_order': {}, 'shape': {}}}".format,
    st.sampled_from(["'<f4'", "'|O'", "'<f2'", "[('a', '<f4')]", "'<V2'", "__import__('os')", "'<U9'", "'|S0'", "7"]),
    st.sampled_from(["False", "True", "1", "None"]),
    st.sampled_from(["(4,)", "()", "(0,)", f"({2**33},)", f"({2**62}, 8)", "(-1,)", "4", "(2, 2)", "(" * 300, "(1,) * 9"]),
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


def test_npz_files_that_grow(accepts_weights) -> None:
    of_ones = npy("{'descr': '<f2', 'fortran_order': False, 'shape': (40000000,)}", bytes(80_000_000))
    for content in (
        npz([("params/Transformer/encoderblock/x.npy", of_ones), ("params/embedding/kernel.npy", of_ones[:1])]),
        npz([("embedding/kernel.npy", of_ones), ("Transformer/encoderblock/x.npy", of_ones)]),
        npz([("a.npy", of_ones)] * 2),
        npz([("a.npy", bytes(500_000_000))]),
        npz([(f"{n}.npy", b"") for n in range(20_000)]),
        npz([("a.npy", npz([("b.npy", npz([("c.npy", of_ones)]))]))]),
    ):
        accepts_weights("weights: npz that grow", content, ".npz")


class Reduced:
    """An object that is unpickled by calling something."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


ASKED_FOR = [
    ("os", "system"), ("posix", "system"), ("subprocess", "Popen"), ("builtins", "exec"), ("builtins", "eval"),
    ("builtins", "open"), ("builtins", "getattr"), ("builtins", "__import__"), ("__builtin__", "eval"), ("pty", "spawn"),
    ("pathlib", "Path.touch"), ("numpy", "ndarray"), ("numpy", "dtype"), ("numpy", "memmap"), ("numpy", "load"),
    ("numpy.core.multiarray", "_reconstruct"), ("numpy", "f2py.crackfortran.myeval"), ("operator", "attrgetter"),
    ("collections", "OrderedDict"), ("collections", "OrderedDict.__init__.__globals__"), ("functools", "partial"),
    ("paddle", "load"), ("torch", "load"), ("vit_static.weight_files", "Path"), ("webbrowser", "open"), ("", ""),
]  # fmt: skip
pickled_arguments = st.sampled_from(
    [("touch canary",), ("open('canary', 'w')",), ("canary", "w"), (), ("",), ((1,), "O", b"A" * 8), ((2**40,), "<f8")]
)


def asking(module: str, name: str, arguments: tuple[Any, ...], protocol: int) -> bytes:
    """A pickle that calls module.name(*arguments), and puts what comes of it into a state dict."""
    called = pickle.dumps(arguments, protocol)
    called = called[2:] if protocol >= 2 else called
    found = f"c{module}\n{name}\n".encode() if protocol < 4 else pickle.dumps((module, name), 4)[11:-3] + b"\x930"
    start = b"\x80\x02" if protocol < 4 else b"\x80\x04"
    found = f"c{module}\n{name}\n".encode()
    return start + b"}X\x04\0\0\0head" + found + called[:-1] + b"Rs."


@cases(150)
@given(st.sampled_from(ASKED_FOR), pickled_arguments, st.sampled_from([0, 1, 2]), st.sampled_from([b"", b"}b", b"\x81", b"2"]))
def test_pickles_that_run_something(accepts_weights, asked: Any, arguments: Any, protocol: int, more: bytes) -> None:
    content = asking(*asked, arguments, protocol)
    accepts_weights("weights: pickles that run code", content[:-2] + more + content[-2:])


OPCODES = [opcode for opcode in pickletools.opcodes if opcode.name not in ("STOP", "FRAME")]
known_names = st.sampled_from(
    [b"ccollections\nOrderedDict\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\n_reconstruct\n"]
)


@st.composite
def opcodes(draw: Callable[[Any], Any]) -> bytes:
    """One opcode and its argument; small numbers, so that what it refers to is often there."""
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


def nested(start: bytes, times: int) -> bytes:
    return start + b"2\x86" * times  # a tuple of the last thing twice


PICKLE_BOMBS = {
    "a key of 2**60": b"}" + nested(b"K\1", 60) + b"K\1s.",
    "keys of 2**60": b"}(" + nested(b"K\1", 60) + b"K\1u.",
    "a mapping with a key of 2**60": b"(" + nested(b"K\1", 60) + b"K\1d.",
    "an ordered one with a key of 2**60": b"ccollections\nOrderedDict\n](" + nested(b"K\1", 60) + b"K\1\x86e\x85R.",
    "a set of 2**60": b"\x8f(" + nested(b"K\1", 60) + b"\x90.",
    "a frozen set of 2**60": b"(" + nested(b"K\1", 60) + b"\x91.",
    "a value of 2**60": b"}X\1\0\0\0a" + nested(b"K\1", 60) + b"s.",
    "a shape of 2**60": b"}X\1\0\0\0acnumpy\nndarray\n)R(K\1" + nested(b"K\1", 60) + b"NNNtbs.",
    "a number of 2**60": b"cnumpy\ndtype\n" + nested(b"K\1", 60) + b"R.",
    "a list in itself": b"]q\0h\0a.",
    "bytes of 4 GB": b"B\xff\xff\xff\xff.",
    "bytes of 2**62": b"\x8e" + struct.pack("<Q", 2**62) + b".",
    "writable bytes of 4 GB": b"\x96" + struct.pack("<Q", 2**32) + b".",
    "text of 4 GB": b"X\xff\xff\xff\xff.",
    "a number of 4 GB": b"\x8b\xff\xff\xff\x7f.",
    "a frame of 2**62": b"\x95" + struct.pack("<Q", 2**62) + b"}.",
    "a frame of 4 GB": b"\x95" + struct.pack("<Q", 2**32) + b"}.",
    "a memo of 2**32": b"}r\xff\xff\xff\xff.",
    "deep lists": b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep tuples": b"}X\1\0\0\0a)" + b"\x85" * 100_000 + b"s.",
    "a long number": b"}X\1\0\0\0aI" + b"9" * 100_000 + b"\ns.",
    "a long name": b"c" + b"x" * 100_000 + b"\ny\n.",
    "an array of 2**60": b"}X\1\0\0\0acnumpy\nndarray\n)R(K\1\x8a\x08" + struct.pack("<Q", 2**60) + b"\x85cnumpy\ndtype\n"
    b"X\2\0\0\0f4\x85R\x89C\4\0\0\0\0tbs.",
    "an extension": b"\x82\1.",
    "a persistent one": b"Pcanary\n.",
}  # fmt: skip


@pytest.mark.timeout(20)
@pytest.mark.parametrize("content", PICKLE_BOMBS.values(), ids=PICKLE_BOMBS)
def test_pickles_that_mean_harm(accepts_weights, content: bytes) -> None:
    accepts_weights("weights: pickles that grow", b"\x80\x04" + content)


@cases(60)
@given(st.sampled_from(["config.yaml", "class_names.txt", "config.json"]), st.data())
def test_what_lies_beside_weights(trial: Trial, name: str, data: st.DataObject) -> None:
    """A run's config and classes, and Hugging Face's config."""
    folder = trial.folder / "beside"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    path = folder / "model.safetensors"
    path.write_bytes(contents(WEIGHTS[1]))
    said = st.fixed_dictionaries({}, optional={
        "num_attention_heads": st.sampled_from([4, 0, -1, True, 10**400, "4", None, 3]),
        "layer_norm_eps": st.sampled_from([1e-6, -1.0, 1e400, 0.0, float("nan"), "x"]),
        "hidden_act": st.sampled_from(["gelu", "gelu_new", "relu", 7, None, ["gelu"], {}, "x" * 1000]),
    }).map(json.dumps)  # fmt: skip
    content = data.draw(st.binary(max_size=30) | said.map(str.encode) | st.just(b"[" * 100_000))
    (folder / name).write_bytes(content)
    with trial.of("files beside weights", "beside" if name == "config.yaml" else ""):
        loaded = load_weights(path)
        config = loaded.config or convert.config_of(loaded.found, str(path), [], None)
        convert.converted(loaded.found, config.model, str(path), InitConfig(head="keep"), None)
