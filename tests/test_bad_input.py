"""Whatever lies in a config, a file of weights, a data set or a model's folder: it is read, or refused in one line.

Hypothesis makes the cases, the same ones every time. For a longer hunt, BAD_INPUT_TIMES=10 makes ten times as many.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import pickle
import pickletools
import resource
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from exported import elsewhere, printed, shape_of_answer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from runs import TINY
from small import REFERENCE, SMALL

from data_tools import check
from vit_static import checkpoint, convert, export
from vit_static import config as config_module
from vit_static.checkpoint import load_weights
from vit_static.config import AugmentConfig, Config, DataConfig, EvalConfig, InitConfig, UserError, load
from vit_static.data.feed import EvalFeed, TrainFeed, why_undecodable
from vit_static.data.images import FileSet, ImageSet
from vit_static.data.lists import DataError, Labels, Lines
from vit_static.data.pipeline import decoding_pipeline, pixels_pipeline
from vit_static.data.relabelled import with_real_labels
from vit_static.data.sets import open_set
from vit_static.model import build
from vit_static.model_folder import CARD_FILE, MODEL_FILE, WEIGHTS_FILE, PredictError
from vit_static.predict import find_images, read_pixels
from vit_static.train import train
from vit_static.weight_files import read_arrays

pytestmark = [
    pytest.mark.reliability,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Duplicate name"),  # zipfile's, of those that are written here
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]

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
    *(
        "",
        " ",
        "../x",
        "..",
        ".",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "-rf",
        "~",
        "x" * 300,
        "é" * 150,
        "\0",
        "\x1b[2J",
        "\u202e",
    ),
    *(
        "007",
        "7",
        "1e3",
        "1_000",
        "0x10",
        "yes",
        "null",
        "=",
        "2024-01-01",
        "nan",
        ".inf",
        "B/16",
        "auto",
        "\ud800",
        "\udcff",
    ),
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


def default_of(key: tuple[str, ...]) -> Any:
    return functools.reduce(lambda found, name: found[name], key, DEFAULTS)


DEFAULTS = Config(name="run").model_dump(mode="json", by_alias=True)
set_keys = st.sampled_from(KEYS).flatmap(
    lambda key: st.tuples(
        st.just(key), values | st.just(default_of(key)) | st.sampled_from([1, 2, 0.5, 1e-3, "7", True])
    )
)
yaml_texts = st.text(st.sampled_from("ab01 \n\t:-[]{},&*!|>'\"#%@`?<=~.\\é\x00\x85\ufeff\U0001f600"), max_size=60)
LAUGHS = "[" + ", ".join(f"&a{n} [{f'*a{n - 1}, *a{n - 1}' if n else 'x'}]" for n in range(60)) + "]"
BOMBS = {
    "laughs": "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)),
    "laughs of a key": f"name: {LAUGHS}",
    "laughs of a number": f"seed: {LAUGHS}",
    "laughs of a list": f"amp: {{white_list: {LAUGHS}}}",
    "laughs of a section": "optim: {betas: &a [&b [&c [1, 1], *c], *b], lr: *a}",
    "merges": "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 60)),
    "itself": "optim: &a {lr: 1, betas: *a}",
    "itself in a list": "amp: {white_list: &a [*a, *a]}",
    "itself merged": "optim: &a {<<: *a, lr: 1}",
    "deep lists": "optim: " + "[" * 1500,
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
@given(st.lists(set_keys, min_size=1, max_size=3), st.booleans())
def test_configs_with_any_values(accepts_config, changed: list[tuple[tuple[str, ...], Any]], flow: bool) -> None:
    document: dict[str, Any] = {}
    for key, value in changed:
        if len(key) == 1:
            document[key[0]] = value
        elif isinstance(document.setdefault(key[0], {}), dict):
            document[key[0]][key[1]] = value
    text = yaml.safe_dump(document, default_flow_style=flow, allow_unicode=True)
    accepts_config("config files: values", text.encode("utf-8", "surrogatepass"), (), "run.yaml")


@cases(200)
@given(
    yaml_texts.map(str.encode) | st.binary(max_size=60) | st.text(max_size=30).map(lambda text: text.encode("utf-16"))
)
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
    for name in (
        "timm_vit.safetensors",
        "hf_vit/model.safetensors",
        "vit_jax.npz",
        "big_vision_scan.npz",
        "plsc.pdparams",
    )
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
    """accepts_weights(kind, content, suffix): one case, up to a model. No file appears, and little memory."""
    folder = trial.folder / "weights"
    folder.mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def accepts(kind: str, content: bytes, suffix: str = ".pdparams") -> None:
        path = folder / f"weights{suffix}"
        path.write_bytes(content)
        try:
            with trial.of(kind, f"weights{suffix}"):
                found = load_weights(path).found
                assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in found.state.values())
                config = convert.config_of(found, str(path), ["model.num_heads=4"], (12, 20))
                convert.converted(found, config.model, str(path), InitConfig(head="keep"), None)
        finally:
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
shapes = (
    st.lists(st.sampled_from([0, 1, 2, 3, 4, 7, 20, 48]), max_size=5)
    .map(tuple)
    .filter(lambda shape: math.prod(shape) < 100_000)
)


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
HEADERS = {
    "of any length": lambda n: safetensors({"a": {}}, length=n),
    "in lists": lambda n: safetensors(b'{"a":' + b"[" * min(n, 100_000)),
    "in mappings": lambda n: safetensors(b'{"a":' * min(n, 20_000)),
    "of spaces": lambda n: safetensors(b"{" + b" " * min(n, 10**6) + b"}"),
    "of an array of that size": lambda n: safetensors(
        {"a": {"dtype": "F32", "shape": [n], "data_offsets": [0, 4 * n]}}
    ),
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


ASKED_FOR = [
    ("os", "system"), ("posix", "system"), ("subprocess", "Popen"), ("builtins", "exec"), ("builtins", "eval"),
    ("builtins", "open"), ("builtins", "getattr"), ("builtins", "__import__"), ("__builtin__", "eval"),
    ("pty", "spawn"),
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
    called = pickle.dumps(arguments, protocol)[2 if protocol >= 2 else 0 : -1]
    return b"\x80\x02}X\x04\0\0\0head" + f"c{module}\n{name}\n".encode() + called + b"Rs."


@cases(150)
@given(
    st.sampled_from(ASKED_FOR),
    pickled_arguments,
    st.sampled_from([0, 1, 2]),
    st.sampled_from([b"", b"}b", b"\x81", b"2"]),
)
def test_pickles_that_run_something(accepts_weights, asked: Any, arguments: Any, protocol: int, more: bytes) -> None:
    content = asking(*asked, arguments, protocol)
    accepts_weights("weights: pickles that run code", content[:-2] + more + content[-2:])


OPCODES = [opcode for opcode in pickletools.opcodes if opcode.name not in ("STOP", "FRAME")]
known_names = st.sampled_from(
    [
        b"ccollections\nOrderedDict\n",
        b"cnumpy\nndarray\n",
        b"cnumpy\ndtype\n",
        b"cnumpy.core.multiarray\n_reconstruct\n",
    ]
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
    "an array of 2**60": b"}X\1\0\0\0acnumpy\nndarray\n)R(K\1\x8a\x08" + struct.pack("<Q", 2**60)
    + b"\x85cnumpy\ndtype\nX\2\0\0\0f4\x85R\x89C\4\0\0\0\0tbs.",
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


# -- images ------------------------------------------------------------------------------------------------------------

MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr", "LAB", "HSV", "RGBX"]
FORMATS = {"JPEG": ".jpg", "PNG": ".png", "BMP": ".bmp", "WEBP": ".webp", "TIFF": ".tif"}
SIZES = [(48, 64), (1, 1), (1, 700), (700, 1), (3, 2), (1, 20_000), (20_000, 1), (8, 20_000)]


@functools.cache
def picture(mode: str, file_format: str, size: tuple[int, int]) -> bytes:
    """An image file, in the nearest mode that the format has; `size` is height and width."""
    if file_format == "WEBP":
        size = (min(size[0], 16_383), min(size[1], 16_383))
    levels = np.linspace(0.0, 1.0, size[0] * size[1]).reshape(size)
    if mode == "F":
        image = Image.fromarray(levels.astype(np.float32))
    elif mode.startswith("I"):
        image = Image.fromarray((levels * 65535).astype(np.uint16 if mode == "I;16" else np.int32))
    else:
        colours = np.stack([levels, levels.T.reshape(size), 1.0 - levels], axis=-1)
        image = Image.fromarray((colours * 255).astype(np.uint8))
        with contextlib.suppress(ValueError):
            image = image.convert(mode)
    file = io.BytesIO()
    try:
        image.save(file, file_format)
    except (OSError, KeyError, ValueError):
        image.convert("L" if mode[0] in "IF" else "RGB").save(file, file_format)
    return file.getvalue()


def png_of(height: int, width: int, depth: int = 8, colours: int = 2, pixels: bytes = b"") -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def jpeg_of(height: int, width: int) -> bytes:
    content = bytearray(picture("RGB", "JPEG", (48, 64)))
    place = content.index(b"\xff\xc0")
    content[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def tiff_of(height: int, width: int) -> bytes:
    content = picture("RGB", "TIFF", (48, 64))
    for tag, value in ((256, width), (257, height)):
        place = (
            content.index(struct.pack("<H", tag) + struct.pack("<H", 3), 8)
            if struct.pack("<HH", tag, 3) in content
            else 0
        )
        place = place or content.index(struct.pack("<HH", tag, 4), 8)
        content = content[:place] + struct.pack("<HHII", tag, 4, 1, value) + content[place + 12 :]
    return content


def bmp_of(height: int, width: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 99, 0, 0, 54) + header + bytes(99)


IMAGE_BOMBS = {
    **{
        f"{make.__name__[:-3]} of {side}": make(side, side)
        for make in (png_of, tiff_of, bmp_of)
        for side in (60_000, 2**31 - 1)
    },
    "jpeg of 65535": jpeg_of(65_535, 65_535),
    "png of one line": png_of(1, 2**31 - 1),
    "png of zeros": png_of(20_000, 20_000, 1, 0, bytes(20_000 * 2501)),
    "png of nothing": png_of(0, 0),
    "png of many bits": png_of(9, 9, 255, 255),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(canary) (w) file closefile\n%%EOF\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "empty": b"",
    "jpeg without an end": b"\xff\xd8" + b"\xff" * 1000,
    "jpeg of segments": b"\xff\xd8" + b"\xff\xe0\0\2" * 50_000,
    "jpeg of no length": b"\xff\xd8\xff\xe0\0\0" * 100,
}

any_picture = st.builds(
    picture, st.sampled_from(MODES), st.sampled_from(list(FORMATS)), st.sampled_from([SIZES[0]] * 6 + SIZES)
)


@st.composite
def any_image(draw: Callable[[Any], Any]) -> tuple[str, bytes]:
    """A file's suffix and content: whole, damaged, or never one."""
    if draw(st.integers(0, 9)) == 0:
        return ".png", draw(st.binary(max_size=100) | st.sampled_from(list(IMAGE_BOMBS.values())))
    file_format = draw(st.sampled_from(list(FORMATS)))
    size = draw(st.sampled_from([SIZES[0]] * 9 + SIZES))
    content = picture(draw(st.sampled_from(MODES)), file_format, size)
    if draw(st.integers(0, 4)):
        content = damaged(content, draw)
    return draw(st.sampled_from([FORMATS[file_format]] * 3 + list(FORMATS.values()))), content


@cases(500)
@given(any_image())
def test_images_to_predict(trial: Trial, image: tuple[str, bytes]) -> None:
    path = trial.folder / f"image{image[0]}"
    path.write_bytes(image[1])
    with trial.of("images: predict", path.name):
        pixels = read_pixels(path)
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size


@pytest.mark.parametrize("content", IMAGE_BOMBS.values(), ids=IMAGE_BOMBS)
def test_images_that_mean_harm(trial: Trial, content: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = trial.folder / "bomb"
    path.write_bytes(content)
    images = FileSet(trial.folder, one_line(b"bomb"), ["a"])
    with pytest.raises(PredictError, match="bomb"):
        read_pixels(path)
    problem = why_undecodable(images, 0)
    assert problem is not None and "bomb" in str(problem)
    for _ in range(2):
        with trial.of("images: bombs", "bomb"):
            raise problem
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def one_line(path: bytes) -> Lines:
    return Lines(np.frombuffer(path, np.uint8), np.array([0]), np.array([len(path)]), Labels(np.zeros(1, np.int32)))


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@cases(12)
@given(st.lists(any_image(), min_size=16, max_size=16))
def test_what_the_check_lets_pass_is_trained_on_and_evaluated(
    trial: Trial, image_folder: Path, images: list[tuple[str, bytes]]
) -> None:
    """And what it doesn't, stops a run with its name."""
    for old in image_folder.rglob("*.*"):
        old.unlink()
    for number, (suffix, content) in enumerate(images):
        path = image_folder / "train" / "ab"[number % 2] / f"{number:02d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    check.main([str(image_folder)])
    report = json.loads((image_folder / "data_check.json").read_text(encoding="utf-8"))
    bad = sorted(found["path"] for found in report["problems"] if found["stops_training"])
    assert all(len(found["detail"]) < LONGEST_MESSAGE for found in report["problems"])
    data = DataConfig(root=str(image_folder), val="train", global_batch_size=4, num_threads=1, num_readers=1)
    everything = open_set(data, "train", 2)
    if len(bad) < len(images):
        kept = open_set(data.model_copy(update={"on_bad_image": "skip"}), "train", 2)
        feed = train_feed(kept, data)
        for _ in range(math.ceil(len(kept) / 4)):
            assert np.isfinite(np.asarray(next(feed)[0])).all()
        batches = list(eval_feed(kept, data))
        assert sum(float(np.asarray(weights).sum()) for _, _, weights in batches) == len(kept)
        for _ in range(len(kept)):
            with trial.of("images: check, training, evaluation"):
                pass
    for place, name in enumerate(bad):
        number = next(number for number in range(len(everything)) if everything.relative_name(number) == name)
        with trial.of("images: check, training, evaluation", name):
            if place < 2:
                alone = everything.without([everything.relative_name(n) for n in range(len(images)) if n != number])
                next(iter((train_feed, eval_feed)[place](alone, data)))
            elif (problem := why_undecodable(everything, number)) is not None:
                raise problem
            raise AssertionError(f"{name} was refused by the check alone")


def train_feed(images: ImageSet, data: DataConfig) -> TrainFeed:
    return TrainFeed(
        images, (16, 16), data, AugmentConfig(), seed=0, start_step=0, dp_rank=0, dp_size=1, device_id=None
    )


def eval_feed(images: ImageSet, data: DataConfig) -> EvalFeed:
    return EvalFeed(images, (16, 16), 4, data, EvalConfig(), dp_rank=0, dp_size=1, device_id=None)


@pytest.mark.parametrize("mode", ["I;16", "F", "1", "LA", "PA", "RGBA", "CMYK", "P"])
def test_predict_reads_what_training_reads(trial: Trial, mode: str) -> None:
    """16-bit grey is scaled: its brightest is white, and its middle grey."""
    content = picture(mode, "TIFF" if mode in ("F", "CMYK") else "PNG", (48, 64))
    (decoded,) = decoding_pipeline(1, 1, None).run(encoded=[np.frombuffer(content, np.uint8)])
    pixels = read_pixels(io.BytesIO(content), "it").astype(int)
    assert np.abs(np.asarray(decoded.as_tensor())[0].astype(int) - pixels).max() <= 1
    if mode in ("I;16", "F"):
        np.testing.assert_allclose(pixels[..., 0].ravel(), np.linspace(0, 255, 48 * 64), atol=1.0)


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 2)])
def test_the_middle_of_a_slim_image_is_what_is_seen(shape: tuple[int, int]) -> None:
    """As Pillow's, of the whole image resized to 24 by 480,000 pixels."""
    grey = np.zeros(shape, np.uint8)
    grey[shape[0] // 2 if shape[0] > 2 else 0 :, shape[1] // 2 if shape[1] > 2 else 0 :] = 255
    scale = 24 / min(shape)
    height, width = (round(side * scale) for side in shape)
    top, left = (height - 24) // 2, (width - 24) // 2
    whole = Image.fromarray(grey).resize((width, height), Image.Resampling.BICUBIC)
    expected = np.asarray(whole.crop((left, top, left + 24, top + 24)), np.float32)
    run = pixels_pipeline(1, 1, (24, 24), DataConfig(), EvalConfig(crop_ratio=1.0)).run
    seen = np.asarray(run(pixels=[np.repeat(grey[..., None], 3, axis=2)])[0].as_tensor())[0, 0]
    assert expected.max() - expected.min() > 100
    np.testing.assert_allclose((seen + 1.0) * 127.5, expected, atol=1.0)


@pytest.mark.timeout(60)
def test_what_is_no_file_is_refused(trial: Trial, tmp_path: Path) -> None:
    """Folders, pipes, devices, and links to themselves that are called as images are."""
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    (folder / "folder.jpg").mkdir()
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "nowhere.jpg").symlink_to("nothing")
    (folder / "device.jpg").symlink_to("/dev/zero")
    (folder / "up").symlink_to("..")
    os.mkfifo(folder / "pipe.jpg")
    names = ["folder", "loop", "nowhere", "device", "pipe"]
    for name in names:
        with trial.of("images: no files", f"{name}.jpg"):
            read_pixels(folder / f"{name}.jpg")
            raise AssertionError(name)
    found = {path.name for path in find_images([tmp_path])}
    assert "folder.jpg" not in found and "pipe.jpg" in found
    listed = "".join(f"train/a/{name}.jpg 0\n" for name in [*names, "a\0b", "x" * 5000, "../../../../../etc/shadow0"])
    (tmp_path / "list.txt").write_text(listed + "/dev/stdin 0\n")
    images = open_set(DataConfig(root=str(tmp_path), train="list.txt"), "train", 1)
    for number in range(len(images)):
        with trial.of("images: no files", images.relative_name(number)[:50].replace("\0", "\\x00")):
            images.read(number)
            raise AssertionError(number)
    assert check.main([str(tmp_path), "--train", "list.txt"]) == 1
    with trial.of("images: no files", str(folder.parent)):
        open_set(DataConfig(root=str(tmp_path)), "train", 1)
        raise AssertionError


def test_the_check_writes_into_no_place_that_a_set_leads_it_to(trial: Trial, tmp_path: Path) -> None:
    (tmp_path / "set/train/a").mkdir(parents=True)
    (tmp_path / "set/train/a/1.png").write_bytes(picture("RGB", "PNG", (48, 64)))
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "set/data_check.json").symlink_to("../elsewhere")
    assert check.main([str(tmp_path / "set")]) == 0
    (tmp_path / "set/.data_check.journal").symlink_to("../elsewhere")
    with pytest.raises(ValueError, match=r"\.data_check\.journal: is no file"):
        check.main([str(tmp_path / "set")])
    assert (tmp_path / "elsewhere").read_text() == "mine"


# -- lists, shards, and what lies beside images ------------------------------------------------------------------------

list_labels = st.sampled_from(["0", "1", "2"]) | st.sampled_from(
    ["", "0,1", "-1", "+1", "1.0", "999999999", "9999999999", "1e3", "x", "1,", ",1", "0,,1", "\u0663", "0x1", "nan"]
)
list_paths = st.sampled_from(["a.jpg", "b c.jpg", "/etc/passwd"]) | st.sampled_from(
    ["../x.jpg", "none.jpg", "", " ", "é.jpg", "\0", "x" * 9000]
)
list_lines = st.builds("{}{}{}".format, list_paths, st.sampled_from([" ", "\t", "  ", "\t\t", "", ","]), list_labels)
list_texts = st.lists(
    list_lines | st.sampled_from(["", " ", "\t", "#", "\r", "\x1c", "\u2028"]) | st.text(max_size=20), max_size=6
).flatmap(lambda lines: st.sampled_from(["\n", "\r\n", "\r", "\n\n"]).map(lambda end: end.join(lines)))


@cases(400)
@given(
    list_texts.flatmap(
        lambda text: st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1", "utf-32"]).map(
            lambda name: text.encode(name, "ignore")
        )
    )
    | st.binary(max_size=40),
    st.booleans(),
)
def test_lists(trial: Trial, content: bytes, multi_label: bool) -> None:
    (trial.folder / "a.jpg").write_bytes(b"x")
    (trial.folder / "train.txt").write_bytes(content)
    with trial.of("list files", "train.txt"):
        data = DataConfig(root=str(trial.folder), train="train.txt", multi_label=multi_label)
        images = open_set(data, "train", 3)
        assert len(images) and images.digest()
        for number in range(len(images)):
            assert images.lines.labels.of(number).max() < 3
            try:
                images.read(number)
            except DataError as error:
                assert str(error).isprintable()


def test_a_list_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes("\ufeffa.jpg 1\r\nb.jpg 0".encode())
    images = open_set(DataConfig(root=str(tmp_path), train="train.txt"), "train", 2)
    assert [images.relative_name(number) for number in range(2)] == ["a.jpg", "b.jpg"]


index_numbers = st.sampled_from(
    ["0", "512", "600", "3", "1024", "-1", "2000", str(2**63), "9" * 5000, "x", "1.0", "\u0661", "1_0", ""]
)
index_fields = st.builds(
    "{} {} {} {}".format, st.sampled_from(["jpg", "cls", "JPG", "json", ""]), *[index_numbers] * 2, st.just("a.jpg")
)
index_texts = st.builds(
    lambda first, lines: "\n".join([first.format(len(lines)), *lines]),
    st.sampled_from(
        ["v1.2 {}", "v1.2 {}", "v1.1 {}", "v1.2 99", "v2 {}", "", "{}", "v1.2 {} {}".replace("{} {}", "{} 1")]
    ),
    st.lists(
        st.builds("{} {}".format, index_fields, index_fields)
        | st.builds("jpg {} {} a.jpg cls {} {} a.cls".format, *[index_numbers] * 4)
        | st.text(max_size=20),
        max_size=3,
    ),
)


@cases(300)
@given(
    index_texts.map(lambda text: text.encode("utf-8", "ignore")) | st.binary(max_size=60),
    st.sampled_from(
        [b"0", b"1", b"7", b"-1", b"0,1", b"", b"x", b"1.0", b"9" * 20, b"9" * 5000, b"\xff", b"1_0", b" 1\n"]
    ),
    st.booleans(),
)
def test_shards(trial: Trial, index: bytes, label: bytes, multi_label: bool) -> None:
    """A tar file of an image and a label; its index may say what it likes."""
    folder = trial.folder / "shards" / "train"
    folder.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in (("a.jpg", b"image"), ("a.cls", label)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    (folder / "0.tar").write_bytes(file.getvalue())
    whole = f"v1.2 1\njpg 512 5 a.jpg cls 1536 {len(label)} a.cls\n".encode()
    (folder / "0.idx").write_bytes(index if len(index) % 4 else whole)
    with trial.of("shards", "0.idx", "0.tar", "its shards"):
        images = open_set(DataConfig(root=str(folder.parent), multi_label=multi_label), "train", 2)
        assert images.digest()
        for number in range(len(images)):
            _, labels = images.read(number)
            assert labels.min() >= 0 and labels.max() < 2


problems_told = st.fixed_dictionaries(
    {},
    optional={
        "path": values.map(repr) | st.sampled_from(["train/a/1.png", "\ud800", 7, None]),
        "stops_training": st.booleans() | st.none(),
    },
)
report_texts = (st.lists(problems_told, max_size=3) | st.just(7)).map(
    lambda problems: json.dumps({"problems": problems})
)
journal_entries = st.fixed_dictionaries(
    {},
    optional={
        "split": st.sampled_from(["train", [], None]),
        "start": st.sampled_from([0, "0", [], -1]),
        "state": st.sampled_from(["x", None]),
        "digests": st.just([1]),
        "problems": st.just([{}]),
        "train": st.just(""),
    },
)
journal_texts = st.lists(journal_entries | st.just([]) | st.none(), max_size=3).map(
    lambda entries: "\n".join(json.dumps(entry) for entry in entries)
)


@cases(120)
@given(
    st.sampled_from(["data_check.json", ".data_check.journal", "class_names.txt"]),
    st.binary(max_size=40) | report_texts.map(str.encode) | journal_texts.map(str.encode) | st.just(b"[" * 100_000),
)
def test_what_lies_beside_images(trial: Trial, name: str, content: bytes) -> None:
    folder = trial.folder / "set"
    (folder / "train/a").mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if old.is_file():
            old.unlink()
    (folder / "train/a/1.png").write_bytes(picture("RGB", "PNG", (48, 64)))
    (folder / name).write_bytes(content)
    with trial.of(f"files beside images: {name}", name, "all of its images are bad"):
        if name.endswith("journal"):
            assert check.main([str(folder)]) == 0
        skip = "skip" if name == "data_check.json" else "stop"
        assert len(open_set(DataConfig(root=str(folder), on_bad_image=skip), "train", 1)) == 1


def test_a_forged_journal_is_not_believed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Entries of the right state whose content is none."""
    (tmp_path / "train/a").mkdir(parents=True)
    (tmp_path / "train/a/1.png").write_bytes(picture("RGB", "PNG", (48, 64)))
    journal = tmp_path / ".data_check.journal"
    sets, _ = check.open_sets(tmp_path, {"train": tmp_path / "train"})
    stats = hashlib.blake2b(repr([check.state_of(sets["train"], 0)]).encode(), digest_size=8).hexdigest()
    for digests, problems in (([], []), (["x"], []), ([1], [{"x": 1}]), ([-1], []), ([1], 7), (None, [])):
        entry = {"split": "train", "start": 0, "state": stats, "digests": digests, "problems": problems}
        journal.write_text(json.dumps({"train": sets["train"].digest()}) + "\n" + json.dumps(entry))
        assert check.main([str(tmp_path)]) == 0
        assert "nothing would stop training" in capsys.readouterr().out


real_texts = [
    "[[0], [1]]",
    "[]",
    "[[]]",
    "[[0], 1]",
    "[[true]]",
    "[[1.0]]",
    "[[-1]]",
    "[[99]]",
    "{}",
    "[" * 99_999,
    "7",
]
real_values = st.recursive(
    st.integers(-1, 3) | st.just(10**30) | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3), max_leaves=8
)


@cases(150)
@given(
    st.sampled_from(real_texts).map(str.encode) | real_values.map(json.dumps).map(str.encode) | st.binary(max_size=30)
)
def test_real_labels(trial: Trial, content: bytes) -> None:
    name = b"ILSVRC2012_val_00000001.JPEG"
    images = FileSet(trial.folder, one_line(name), ["a", "b"])
    (trial.folder / "real.json").write_bytes(content)
    with trial.of("real.json", "real.json"):
        found = with_real_labels(images, trial.folder / "real.json", 2)
        assert all(found.lines.labels.of(number).max() < 2 for number in range(len(found)))


# -- model folders -----------------------------------------------------------------------------------------------------

MODEL = SMALL.model_copy(update={"representation_size": None, "layer_scale_init": None})
FILES = (MODEL_FILE, WEIGHTS_FILE, CARD_FILE)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files of three exports of a small model: `one`, `other` weights, and `nan` ones."""
    found = {}
    for name in ("one", "other", "nan"):
        folder = tmp_path_factory.mktemp(name)
        model = build(MODEL)
        if name == "nan":
            model.set_state_dict({key: value * float("nan") for key, value in model.state_dict().items()})
        model.eval()
        config = Config(name="x", model=MODEL)
        export.write(model, config, export.card_of(config, [f"class {n}" for n in range(5)]), folder)
        found[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
    return found


@pytest.fixture(scope="module")
def accepts_model(trial: Trial) -> Callable[..., None]:
    """accepts_model(kind, files, names...): one case, up to the probabilities of an image."""
    folder = trial.folder / "model"
    folder.mkdir()

    def accepts(kind: str, files: dict[str, bytes | None], *names: str) -> None:
        for name, content in files.items():
            (folder / name).unlink(missing_ok=True)
            if content is not None:
                (folder / name).write_bytes(content)
        with trial.of(kind, *(names or [str(folder)])):
            assert elsewhere(shape_of_answer, folder) == (1, 5)

    accepts.folder = folder  # type: ignore[attr-defined]
    return accepts


@cases(150)
@given(st.sampled_from(FILES), st.sampled_from(["damage", "damage", "damage", "none", "other", "any"]), st.data())
def test_damaged_model_folders(accepts_model, exported: Any, name: str, harm: str, data: st.DataObject) -> None:
    """Paddle is given no file that isn't what was written; it would end the process."""
    whole = exported["one"]
    changed = {
        "damage": lambda: damaged(whole[name], data.draw),
        "none": lambda: None,
        "other": lambda: exported["other"][name],
        "any": lambda: data.draw(st.binary(max_size=50)),
    }[harm]()
    same = changed == whole[name] or (name == MODEL_FILE and harm == "other" and changed == whole[name])
    accepts_model("model folders: files", {**whole, name: changed}, *([] if same else [name, CARD_FILE]))
    if name != CARD_FILE and not same:
        with pytest.raises(PredictError, match=r"no such file|damaged"):
            elsewhere(shape_of_answer, accepts_model.folder)


card_values = st.sampled_from(
    [None, 0, -1, 1, 2, 12, 10**6, 2**63, 1e-30, 1e30, "", "x", "float16", "sigmoid", True, [], [0], [1, 1], {}]
)
card_values |= st.sampled_from([[1e-30] * 3, [1e30] * 3, [24, 16], [100_000] * 2, ["a"] * 5, ["\x1b"] * 5, [7] * 5])


@cases(150)
@given(st.data())
def test_cards_of_any_values(accepts_model, exported: Any, data: st.DataObject) -> None:
    card = json.loads(exported["one"][CARD_FILE])
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(
            st.sampled_from([(), ("preprocessing",), ("preprocessing",), ("model",), ("files",), ("files", MODEL_FILE)])
        )
        inside = functools.reduce(lambda found, key: found.get(key, {}) if isinstance(found, dict) else {}, place, card)
        if not isinstance(inside, dict) or not inside:
            continue
        key = data.draw(st.sampled_from(sorted(inside)))
        if data.draw(st.integers(0, 5)) == 0:
            del inside[key]
        else:
            inside[key] = data.draw(card_values)
    accepts_model("model folders: cards", {**exported["one"], CARD_FILE: json.dumps(card).encode()})


@pytest.mark.parametrize("size", [[16, 16], [24, 32], [4, 4], [400, 16], [60_000, 60_000]])
def test_a_card_of_another_image_size_is_refused(accepts_model, exported: Any, size: list[int]) -> None:
    card = json.loads(exported["one"][CARD_FILE])
    card["preprocessing"]["image_size"] = card["model"]["image_size"] = size
    other = {**exported["one"], CARD_FILE: json.dumps(card).encode()}
    accepts_model("model folders: cards", other, "can't be run on images of", "more than")


def test_an_older_export_is_refused_with_the_remedy(accepts_model, exported: Any) -> None:
    card = json.loads(exported["one"][CARD_FILE])
    del card["files"]
    older = {**exported["one"], CARD_FILE: json.dumps(card).encode()}
    accepts_model("model folders: cards", older, "older version's export, without the sizes and digests")


def test_what_is_no_number_is_no_probability(tmp_path: Path, exported: Any) -> None:
    """A model of NaN gives its images lines with an error, which are JSON; so does a name that is no text."""
    for name, content in exported["nan"].items():
        (tmp_path / name).write_bytes(content)
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "\udcff.png")
    code, output = elsewhere(printed, tmp_path, [tmp_path])
    assert code == 2
    (line,) = output.splitlines()
    found = json.loads(line, parse_constant=pytest.fail)
    assert found["path"].endswith("\udcff.png") and "no numbers" in found["error"]


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_checkpoint(tmp_path_factory: pytest.TempPathFactory, small_digits: Path) -> dict[str, bytes]:
    """The files of one that a run has written."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "tiny.yaml").write_text(TINY)
    overrides = [f"data.root={small_digits}", f"output_dir={folder / 'output'}", "train.max_steps=1", "model.depth=1"]
    run = config_module.load(folder / "tiny.yaml", overrides)
    train(run)
    return {path.name: path.read_bytes() for path in checkpoint.folder(run.run_dir, 1).iterdir()}


@pytest.fixture(scope="module")
def accepts_checkpoint(trial: Trial) -> Callable[..., None]:
    folder = trial.folder / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)

    def accepts(files: dict[str, bytes | None]) -> None:
        """All that is read of it: where the run stands, its weights."""
        for name, content in files.items():
            (folder / name).unlink(missing_ok=True)
            if content is not None:
                (folder / name).write_bytes(content)
        with trial.of("checkpoints", str(folder), *files):
            checkpoint.verify(folder)
            checkpoint.read_progress(folder)
            checkpoint.load_weights(folder)

    accepts.folder = folder  # type: ignore[attr-defined]
    return accepts


@cases(150)
@given(st.data())
def test_damaged_checkpoints(accepts_checkpoint, whole_checkpoint: dict[str, bytes], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(whole_checkpoint)))
    is_missing = data.draw(st.integers(0, 9)) == 0
    changed = None if is_missing else damaged(whole_checkpoint[name], data.draw)
    accepts_checkpoint({**whole_checkpoint, name: changed})
    if changed != whole_checkpoint[name]:
        with pytest.raises(UserError):
            checkpoint.verify(accepts_checkpoint.folder)


@cases(200)
@given(st.data())
def test_checkpoints_that_were_made_to_harm(
    accepts_checkpoint, whole_checkpoint: dict[str, bytes], data: st.DataObject
) -> None:
    """Whose manifest says what their files are."""
    files: dict[str, bytes] = dict(whole_checkpoint)
    name = data.draw(st.sampled_from(["meta.json", "rank_00000.safetensors", "manifest.json", "class_names.txt"]))
    if name.endswith(".json"):
        content = json.loads(files[name])
        places = [content, *(value for value in content.values() if isinstance(value, dict))]
        inside = data.draw(st.sampled_from(places))
        key = data.draw(st.sampled_from(sorted(inside)))
        inside[key] = data.draw(card_values)
        files[name] = json.dumps(content).encode()
    else:
        files[name] = damaged(files[name], data.draw)
    if name != "manifest.json":
        manifest = json.loads(files["manifest.json"])
        manifest["files"][name] = {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
        files["manifest.json"] = json.dumps(manifest).encode()
    accepts_checkpoint(files)
