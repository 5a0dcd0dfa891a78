"""The reference of the config: every key of the schema, in words that agree with what the schema accepts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.small import ROOT

from vit_static.common.errors import UserError
from vit_static.config.describe import changed_keys, changed_settings, describe_keys, describe_section, find_keys
from vit_static.config.loader import load_config
from vit_static.config.mistakes import all_keys
from vit_static.config.other_names import OTHER_NAMES, SYNONYMS
from vit_static.config.print_reference import print_page
from vit_static.config.yaml_loader import read_yaml

KEYS = {key.name: key for keys in describe_keys().values() for key in keys}


def names(query: str | None) -> list[str]:
    return [key.name for keys in find_keys(query).values() for key in keys]


def test_every_key_is_described() -> None:
    assert list(KEYS) and set(KEYS) == set(all_keys())
    assert all(key.type and key.default and key.meaning for key in KEYS.values())
    assert all(describe_section(section) for section in describe_keys())


def test_defaults_are_values_that_the_key_accepts() -> None:
    """Written into a config, all of them together are the config without any key."""
    overrides = [f"{key.name}={key.default}" for key in KEYS.values() if key.name != "name"]
    assert load_config(None, overrides) == load_config(None)
    assert read_yaml(KEYS["optim.betas"].default) == [0.9, 0.999]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("optim.lr", "number, at least 0"),
        ("model.dropout", "number, at least 0, below 1"),
        ("model.pool", "cls, gap, cls_gap or map"),
        ("model.depth", "whole number, at least 1; or null"),
        ("augment.crop_scale", "[number, number], each at least 0, at most 1"),
        ("optim.no_decay", "list of: bias, norm or embedding"),
        ("eval.also", "{NAME: text, ...}"),
        ("kernels.onednn", "true or false"),
        ("data.label_column", "text or list of: text"),
        ("seed", "whole number, at least 0"),
    ],
)
def test_types_are_in_words(key: str, words: str) -> None:
    assert KEYS[key].type == words


def test_keys_are_found_by_section_name_and_meaning() -> None:
    assert names("optim")[:2] == ["optim.name", "optim.lr"]
    assert names("optim.lr") == names("lr") == ["optim.lr"]
    assert "augment.random_erasing_probability" in names("random erasing") and names(None) == list(KEYS)
    with pytest.raises(UserError, match=r"did you mean model\.image_size"):
        find_keys("model.image_sizes")
    with pytest.raises(UserError, match="config' lists all"):
        find_keys("qqqq")


@pytest.mark.parametrize("query", ["cutout", "erase", "erasing", "random-erasing", "random_erasing"])
def test_a_search_finds_all_keys_about_a_thing(query: str) -> None:
    assert names(query) == [key for key in KEYS if "random_erasing" in key]


@pytest.mark.parametrize(
    ("query", "keys"),
    [
        ("stochastic depth", {"model.drop_path_rate", "model.drop_path_schedule"}),
        ("warmup", {"schedule.warmup_steps", "schedule.warmup_epochs", "optim.ema_warmup"}),
        ("weight decay", {"optim.weight_decay", "optim.no_decay"}),
        ("batch_size", {"data.global_batch_size", "eval.batch_size"}),
        ("dropout", {"model.dropout", "model.attention_dropout"}),
        ("num_workers", {"data.num_threads"}),
        ("resized", {"eval.resize"}),
        ("fracti", {"train.epochs"}),  # a part of a word
    ],
)
def test_a_search_knows_synonyms_and_forms_of_words(query: str, keys: set[str]) -> None:
    assert keys <= set(names(query)) and len(names(query)) < 20


def test_synonyms_name_keys() -> None:
    for terms in SYNONYMS:
        for term in terms.split(", "):
            assert names(term), term
    for prefix in (prefix for prefixes in SYNONYMS.values() for prefix in prefixes):
        assert any(key == prefix or key.startswith((f"{prefix}_", f"{prefix}.")) for key in KEYS), prefix
    assert set(OTHER_NAMES.values()) <= set(KEYS)


def test_the_page_is_that_of_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    print_page()
    written = (ROOT / "configs/CONFIG.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == written, "run ./run.sh config --markdown > configs/CONFIG.md"
    rows = re.findall(r"^\| `([\w.]+)` (?:\|.*[^\s|].*){3}\|$", written, re.MULTILINE)
    assert rows == list(KEYS)


def test_a_config_differs_from_the_defaults_in_what_it_sets(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("optim: {lr: 1e-3, weight_decay: 0.1}\nmodel: {image_size: 64}")
    changed = changed_keys(load_config(path, ["amp.level=O0"]))
    assert changed == [
        ("name", "the name of the config file", "mine"),
        ("model.image_size", "[224, 224]", "[64, 64]"),
        ("optim.weight_decay", "0.0", "0.1"),
        ("amp.level", "auto", "O0"),
    ]


def test_changed_settings_are_one_line() -> None:
    old, new = load_config(None, ["optim.lr=0.1"]), load_config(None, ["optim.lr=0.2", "name=b", "data.mean=[0, 0, 0]"])
    line = changed_settings(old, new, ignored=("name",))
    assert line == "data.mean [0.5, 0.5, 0.5] -> [0.0, 0.0, 0.0], optim.lr 0.1 -> 0.2"
    assert changed_settings(old, old) is None
