"""Arbitrary configs and overrides are read, or refused in one line."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.bad_input import ODD_NUMBERS, ODD_TEXTS, Trial, cases, pytestmark, scalars, values  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st

from vit_static.config.loader import dump_config, load_config
from vit_static.config.schema import Config
from vit_static.config.section import Section
from vit_static.optim.schedule import total_steps, warmup_steps

SECTIONS = {
    name: field.annotation.model_fields
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
KEYS: list[tuple[str, ...]] = [
    (name, field.alias or key) for name, fields in SECTIONS.items() for key, field in fields.items()
]
KEYS += [(name,) for name in Config.model_fields]


DEFAULTS = Config(name="run").model_dump(mode="json", by_alias=True)
DEFAULTS["model"]["from"] = "config"  # not part of a resolved config


def default_of(key: tuple[str, ...]) -> Any:
    return functools.reduce(lambda section, name: section[name], key, DEFAULTS)


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
    """Return a function accepts_config(kind, content, overrides, *names): try one case.

    A config that loads must load again, equal, after it is written.
    """
    path = trial.folder / "run.yaml"

    def accepts(kind: str, content: bytes, overrides: Sequence[str] = (), *names: str) -> None:
        path.write_bytes(content)
        with trial.of(kind, *names):
            config = load_config(path, overrides)
            dump_config(config, trial.folder / "again.yaml")
            assert load_config(trial.folder / "again.yaml") == config
            assert config.run_dir.parent == Path(config.output_dir)
            os.fsencode(config.run_dir)
            total_steps(config.train, 1000, config.data.global_batch_size)
            warmup_steps(config.schedule, 1000, config.data.global_batch_size)

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
def test_hostile_configs(accepts_config, trial: Trial, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trial.folder)
    accepts_config("config files: bombs", text.encode("utf-8", "surrogatepass"), (), "run.yaml")
    assert not (trial.folder / "canary").exists()


@cases(100)
@given(st.sampled_from(KEYS), st.booleans())
def test_duplicate_keys_are_refused(trial: Trial, key: tuple[str, ...], in_override: bool) -> None:
    once = f"{key[-1]}: 1"
    nested = f"{key[0]}: {{{once}, x: 2, {once}}}" if len(key) == 2 else f"{once}\nx: 2\n{once}"
    path = trial.folder / "run.yaml"
    path.write_text("" if in_override else nested)
    with trial.of("config files: keys twice", f"line 1: the key '{key[-1]}' appears twice", "line 3: the key"):
        load_config(path, [f"optim={{{once}, {once}}}"] if in_override else [])
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
def test_a_name_may_be_a_number_and_keeps_its_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(f"name: {text}\ndata: {{root: {text}}}")
    for config in (load_config(tmp_path / "run.yaml"), load_config(None, [f"name={text}", f"data.root={text}"])):
        assert (config.name, config.data.root) == (text, text)
