"""Config files, overrides, and messages of one line for mistakes in them."""

from __future__ import annotations

import re
from pathlib import Path

import pydantic
import pytest
from helpers.config_text import message_of
from helpers.small import ROOT

from vit_static.common.errors import ConfigError
from vit_static.config.loader import dump_config, load_config
from vit_static.config.mistakes import OTHER_NAMES, RENAMED_KEYS, RENAMED_VALUES, all_keys
from vit_static.config.schema import Config
from vit_static.config.section import Section
from vit_static.model.variants import variant_of

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_without_a_file_the_defaults_load() -> None:
    config = load_config(None)
    assert config == Config(name="run")
    assert config.model.image_size == (224, 224)
    assert config.run_dir == Path("output/run")


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n"])
def test_an_empty_file_is_the_defaults_named_after_the_file(load_text, text: str) -> None:
    assert load_text(text) == Config(name="run")


def test_a_run_is_named_after_its_file_unless_name_is_set(tmp_path: Path) -> None:
    path = tmp_path / "vit.b16.yaml"
    path.write_text("seed: 3\n")
    assert load_config(path).name == "vit.b16"
    path.write_text("name: other\noutput_dir: elsewhere\n")
    assert load_config(path).run_dir == Path("elsewhere/other")


@pytest.mark.parametrize("text", ["3e-3", "3.0e-3", "0.003", ".003", "3E-3", "'3e-3'"])
def test_a_number_may_be_written_in_any_notation(load_text, text: str) -> None:
    for config in (load_text(f"optim: {{lr: {text}}}"), load_config(None, [f"optim.lr={text}"])):
        assert config.optim.lr == 0.003
        assert type(config.optim.lr) is float


@pytest.mark.parametrize(("written", "size"), [("96", (96, 96)), ("[96, 128]", (96, 128))])
def test_an_image_size_is_one_side_or_height_and_width(load_text, written: str, size: tuple[int, int]) -> None:
    assert load_text(f"model: {{image_size: {written}}}").model.image_size == size


def test_a_dumped_config_loads_again_equal(tmp_path: Path) -> None:
    overrides = [
        "name=again",
        "model.image_size=[96, 128]",
        "model.layer_scale_init=1e-5",
        "optim.lr=3e-3",
        "optim.clip_norm=null",
        "init.from=weights.pdparams",
        "parallel.dp=2",
        "augment.crop_scale=[0.05, 1]",
        "schedule.end_lr=1e-5",
    ]
    config = load_config(None, overrides)
    dump_config(config, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert again != load_config(None, overrides[:-1])
    assert "from: weights.pdparams" in (tmp_path / "config.yaml").read_text()


def test_a_config_is_frozen() -> None:
    config = load_config(None)
    for section, key in ((config, "seed"), (config.optim, "lr"), (config.model, "image_size")):
        with pytest.raises(pydantic.ValidationError, match="frozen"):
            setattr(section, key, 1)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_repository_loads_and_names_a_valid_model(path: Path) -> None:
    config = load_config(path)
    variant_of(config.model)
    assert config.name == path.stem
    micro_batch_size, rest = divmod(config.data.global_batch_size, config.parallel.grad_accum_steps)
    assert micro_batch_size >= 1 and rest == 0


def test_the_repository_has_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize(
    ("text", "wrong", "nearest"),
    [
        ("optim: {lrr: 1}", "optim.lrr", "optim.lr"),
        ("optim: {weightdecay: 1}", "optim.weightdecay", "optim.weight_decay"),
        ("model: {img_size: 224}", "model.img_size", "model.image_size"),
        ("init: {form: x}", "init.form", "init.from"),
        ("optmi: {lr: 1}", "optmi", "optim"),
        ("sede: 1", "sede", "seed"),
    ],
)
def test_the_message_for_a_misspelt_key_has_file_path_and_nearest_key(
    load_text, text: str, wrong: str, nearest: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load_text(text)
    message = message_of(error)
    assert "run.yaml: " in message
    assert f" {wrong} is not a key" in message
    assert f"did you mean {nearest}?" in message


def test_other_programs_names_lead_to_keys_that_exist() -> None:
    assert set(OTHER_NAMES.values()) <= set(all_keys())
    assert not set(OTHER_NAMES) & {key.rpartition(".")[2] for key in all_keys()} - {"batch_size"}


def test_a_config_of_the_repository_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("deit_s16", "deit_s16.yaml"):
        assert load_config(Path(name)) == load_config(ROOT / "configs/deit_s16.yaml")
    Path("deit_s16.yaml").write_text("seed: 3")
    assert load_config(Path("deit_s16.yaml")).seed == 3
    for name, similar in (("deit_s", "did you mean deit_s16"), ("quick", "quickstart"), ("zzz", "./run.sh recipes")):
        with pytest.raises(ConfigError, match="no such file") as error:
            load_config(Path(name))
        assert similar in message_of(error)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("L/16", r"set -o model\.variant=L/16 \(recipes with this variant: .*augreg_l16_cifar10"),
        ("vit_s16", r"set -o model\.variant=S/16 \(recipes with this variant: .*deit_s16"),
        ("ViT-ti/16", r"set -o model\.variant=Ti/16 \(recipes .*quickstart"),
        ("g/14", r"set -o model\.variant=g/14 \('./run.sh models' lists them\)"),
    ],
)
def test_a_model_variant_instead_of_a_config_is_named_as_such(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(name)


def test_the_message_for_a_key_similar_to_none_lists_all_keys(load_text) -> None:
    with pytest.raises(ConfigError) as error:
        load_text("schedule: {zzzzz: 1}")
    assert "schedule.zzzzz is not a key; there are name, warmup_steps, warmup_epochs, " in message_of(error)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("seed: abc", "seed", "'abc'"),
        ("seed: 1.5", "seed", "1.5"),
        ("seed: -1", "seed", "-1"),
        ("seed: 1e400", "seed", "'1e400'"),
        ("optim: {lr: fast}", "optim.lr", "'fast'"),
        ("optim: {lr: [1, 2]}", "optim.lr", "[1, 2]"),
        ("optim: {lr: {a: {b: 1}}}", "optim.lr", "{'a': {'b': 1}}"),
        ("optim: {lr: null}", "optim.lr", "None"),
        ("optim: {lr: -1e-3}", "optim.lr", "'-1e-3'"),
        ("optim: {lr: -0.5}", "optim.lr", "-0.5"),
        ("optim: {lr: .nan}", "optim.lr", "nan"),
        ("optim: {lr: .inf}", "optim.lr", "inf"),
        ("optim: {lr: 2024-01-01}", "optim.lr", "2024"),
        ("optim: {betas: 0.9}", "optim.betas", "0.9"),
        ("optim: {betas: [0.9]}", "optim.betas", "[0.9]"),
        ("optim: {betas: [0.9, 1.0]}", "optim.betas", "1.0"),
        ("optim: {clip_norm: 0}", "optim.clip_norm", "0"),
        ("optim: {name: adam}", "optim.name", "'adam'"),
        ("model: {dropout: 1.0}", "model.dropout", "1.0"),
        ("model: {image_size: 0}", "model.image_size", "0"),
        ("model: {image_size: [224, 0]}", "model.image_size", "0"),
        ("model: {image_size: [224]}", "model.image_size", "[224]"),
        ("model: {image_size: [1, 2, 3]}", "model.image_size", "[1, 2, 3]"),
        ("model: {image_size: 224.5}", "model.image_size", "224.5"),
        ("model: {image_size: big}", "model.image_size", "'big'"),
        ("model: {image_size: true}", "model.image_size", "True"),
        ("model: {variant: [3]}", "model.variant", "[3]"),
        ("model: {pool: max}", "model.pool", "'max'"),
        ("train: {epochs: 0}", "train.epochs", "0"),
        ("train: {max_restarts: -1}", "train.max_restarts", "-1"),
        ("train: {node_timeout_s: 0}", "train.node_timeout_s", "0"),
        ("train: {max_steps: 0}", "train.max_steps", "0"),
        ("data: {global_batch_size: 0}", "data.global_batch_size", "0"),
        ("data: {std: [0.5, 0.5, 0]}", "data.std", "0"),
        ("data: {root: [a, b]}", "data.root", "['a', 'b']"),
        ("augment: {antialias: perhaps}", "augment.antialias", "'perhaps'"),
        ("augment: {flip_probability: 1.1}", "augment.flip_probability", "1.1"),
        ("augment: {crop_scale: [0.5, 0.1]}", "augment.crop_scale", "[0.5, 0.1]"),
        ("augment: {crop_aspect_ratio: [2, 1]}", "augment.crop_aspect_ratio", "[2.0, 1.0]"),
        ("eval: {crop_pct: 0}", "eval.crop_pct", "0"),
        ("parallel: {dp: many}", "parallel.dp", "'many'"),
        ("parallel: {sharding_stage: 4}", "parallel.sharding_stage", "4"),
        ("name: a/b", "name", "'a/b'"),
        ("name: ''", "name", "''"),
        ("model: 3", "model", "3"),
        ("model: [1, 2]", "model", "[1, 2]"),
        ("model: {1: 2}", "model.1", "1"),
        ("1: 2", "1", "1"),
        ("null: 2", "None", "None"),
    ],
)
def test_the_message_for_a_wrong_value_has_file_path_and_value(load_text, text: str, key: str, value: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_text(text)
    folder, _, mistake = message_of(error).partition("run.yaml: ")
    assert folder and mistake.startswith((f"{key} = ", f"{key}: "))
    assert value in mistake


@pytest.mark.parametrize(
    "text", ["seed: true", "optim: {lr: true}", "data: {global_batch_size: true}", "model: {dropout: no}"]
)
def test_a_boolean_is_refused_as_a_number(load_text, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_text(text)
    assert text.partition(":")[0] in message_of(error)


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "a: b: c",
        "model:\n\tdepth: 3",
        "a: *nowhere",
        "[1, 2]: 3",
        "<<: 3",
        "a: !!python/object/apply:os.system [true]",
        "- 1\n- 2\n",
        "3",
        "'text'",
        "optim: &loop {lr: *loop}",
        "model: {depth: {a: [{b: [[1, {c: 2}]]}]}}",
        "model: {depth: [[[[[[[[[[[[]]]]]]]]]]]]}",
        "a\\nb: 3",
        '"a\\nb": 3',
        'optim: {"a\\nb": 3}',
        'optim: {lr: "a\\nb"}',
        "model: " + "[" * 3000,
        "x" * 5000,
        b"\xff\xfe\x00\x80",
        b"\x89PNG\r\n\x1a\n\x00\x00",
        b"seed: \x01",
        b"seed: 1\x00",
    ],
    ids=lambda text: repr(text)[:40],
)
def test_invalid_files_are_refused_in_one_line_that_names_the_file(load_text, text: str | bytes) -> None:
    with pytest.raises(ConfigError) as error:
        load_text(text)
    assert "run.yaml: " in message_of(error)


@pytest.mark.parametrize(
    "text", ["optim: &a {lr: 1}", "seed: 1\nlog: *a", "optim: {<<: *a}", "optim: {betas: [&a 0.9, 1]}"]
)
def test_anchors_and_aliases_are_refused_with_their_line(load_text, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_text(text)
    line = 1 + text[: re.search(r"[&*]a", text).start()].count("\n")
    assert f"line {line}: anchors (&NAME) and aliases (*NAME) are not supported; repeat the value" in message_of(error)


@pytest.mark.parametrize("old_name", RENAMED_KEYS)
def test_the_message_for_a_renamed_key_has_the_new_name(load_text, old_name: str) -> None:
    section, _, key = old_name.partition(".")
    new_section, _, new_key = RENAMED_KEYS[old_name].partition(".")
    assert new_key in Config.model_fields[new_section].annotation.model_fields
    for text, overrides, origin in ((f"{section}: {{{key}: 1}}", [], "run.yaml"), ("", [f"{old_name}=1"], "-o")):
        with pytest.raises(ConfigError) as error:
            load_text(text, *overrides)
        assert f"{old_name} is now called {new_section}.{new_key}" in message_of(error)
        assert origin in message_of(error)


@pytest.mark.parametrize(("key", "old_value"), RENAMED_VALUES)
def test_the_message_for_a_renamed_value_has_the_new_one(load_text, key: str, old_value: str) -> None:
    section, _, name = key.partition(".")
    new_value = RENAMED_VALUES[key, old_value]
    old_keys = [old.partition(".")[2] for old, new in RENAMED_KEYS.items() if new == key]
    for written in (name, *old_keys):
        in_file, override = f"{section}: {{{written}: {old_value}}}", f"{section}.{written}={old_value}"
        for text, overrides in ((in_file, []), ("", [override])):
            with pytest.raises(ConfigError) as error:
                load_text(text, *overrides)
            assert f"the value {old_value} is now called {new_value}" in message_of(error)
    assert getattr(getattr(load_config(None, [f"{key}={new_value}"]), section), name) == new_value


def test_every_key_has_a_description() -> None:
    for section_name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            assert field.annotation.__doc__
            for name, key in field.annotation.model_fields.items():
                assert key.description, f"{section_name}.{name}"
        else:
            assert field.description, section_name


def test_the_message_for_an_unreadable_file_names_it(tmp_path: Path) -> None:
    for path, problem in ((tmp_path / "gone.yaml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError) as error:
            load_config(path)
        assert message_of(error).startswith(f"{path}: ")
        assert problem in message_of(error)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule.name=cosine"], "schedule.name = 'cosine': the learning rate of optim.name = 'schedule_free_adamw'"),
        (["schedule.cooldown_steps=5"], "set schedule.cooldown_steps=0, or another optimizer"),
        (["schedule.warmup_start_lr=1e-6"], "schedule.warmup_start_lr = 1e-06: "),
        (["optim.ema_decay=0.99"], "ema_decay = 0.99: name = 'schedule_free_adamw' has an average of the weights"),
        (["optim.betas=[0, 0.99]"], "the first one of schedule_free_adamw must be above 0"),
    ],
)
def test_what_contradicts_schedule_free_is_refused(load_text, overrides: list[str], message: str) -> None:
    """The schedule's own default, cosine, does not: the learning rate is constant unless a config says otherwise."""
    free = "optim: {name: Schedule_Free_AdamW}\nschedule: {warmup_steps: 5}"
    assert load_text(free).schedule.name == "constant"
    with pytest.raises(ConfigError) as error:
        load_config(None, ["optim.name=schedule_free_adamw", *overrides])
    assert message in message_of(error)


TEACHER = "distill.teacher=run"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distill.kind=hard"], "distill.kind=hard: without a teacher it has no effect; set teacher=PATH"),
        ([TEACHER, "distill.weight=0"], "distill.weight=0: must be above 0"),
        (
            [TEACHER, "distill.kind=hard", "distill.temperature=2"],
            "kind = 'hard' has no temperature; set temperature=1",
        ),
        (
            [TEACHER, "data.multi_label=true", "loss.name=bce"],
            "distill.kind = 'soft': takes one label per image, and data.multi_label has several; set distill.kind=feat",
        ),
        ([TEACHER, "distill.kind=token"], "set model.distillation_token=true"),
        ([TEACHER, "model.distillation_token=true"], "has a head for the teacher's labels; set distill.kind=token"),
        ([TEACHER, "distill.token_label=soft"], "kind = 'soft' has no token; set kind=token"),
        (
            [TEACHER, "distill.kind=features", "train.freeze=backbone"],
            "distill.kind = 'features': train.freeze = 'backbone' leaves the features as they are; set kind=soft",
        ),
    ],
)
def test_what_contradicts_distillation_is_refused(load_text, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_text("", *overrides)
