"""Overrides of config keys (`-o key=value`), and what is said of mistakes in them."""

from __future__ import annotations

import pytest
from helpers.config_text import message_of

from vit_static.common.errors import ConfigError
from vit_static.config.loader import load_config


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optim.betas=[0.8, 9e-1]", "optim", "betas", (0.8, 0.9)),
        ("augment.crop_scale=[5e-2,1]", "augment", "crop_scale", (0.05, 1.0)),
        ("optim.clip_norm=null", "optim", "clip_norm", None),
        ("optim.clip_norm=", "optim", "clip_norm", None),
        ("optim.lr=1", "optim", "lr", 1.0),
        ("log.tensorboard=false", "log", "trackers", ()),
        ("log.tensorboard=true", "log", "trackers", ("tensorboard",)),
        ("log.trackers=[wandb]", "log", "trackers", ("wandb",)),
        ("model.qkv_bias=true", "model", "qkv_bias", True),
        ("model.variant=L/16", "model", "variant", "L/16"),
        ("parallel.dp=auto", "parallel", "dp", "auto"),
        ("parallel.dp=4", "parallel", "dp", 4),
        ("model.image_size=384", "model", "image_size", (384, 384)),
        ("model.image_size=[192, 256]", "model", "image_size", (192, 256)),
        ("data.root=/data/a b", "data", "root", "/data/a b"),
        ("init.from=output/a=b/model.pdparams", "init", "from_", "output/a=b/model.pdparams"),
    ],
)
def test_overrides_are_read_by_the_declared_type(override: str, section: str, key: str, value: object) -> None:
    loaded = getattr(getattr(load_config(None, [override]), section), key)
    assert loaded == value
    assert type(loaded) is type(value)


def test_overrides_replace_values_of_the_file_and_later_overrides_win(load_text) -> None:
    config = load_text("seed: 1\noptim: {lr: 1, weight_decay: 2}", "optim.lr=3", "seed=4", "optim.lr=5")
    assert (config.seed, config.optim.lr, config.optim.weight_decay) == (4, 5.0, 2.0)


@pytest.mark.parametrize(
    ("override", "wrong", "nearest"),
    [("optim.lrr=1", "optim.lrr", "optim.lr"), ("optmi.lr=1", "optmi", "optim"), ("sede=1", "sede", "seed")],
)
def test_the_message_for_a_misspelt_override_has_the_nearest_key(override: str, wrong: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    message = message_of(error)
    assert message.startswith("-o")
    assert f"{wrong} is not a key; did you mean {nearest}?" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=1", "-o optim.learning_rate is not a key; did you mean optim.lr?"),
        ("lr=1", "-o lr is not a key; did you mean optim.lr?"),
        ("optim.epochs=3", "-o optim.epochs is not a key; did you mean train.epochs?"),
        ("data.batch_size=3", "-o data.batch_size is not a key; did you mean data.global_batch_size?"),
        ("image_size=224,224", "-o image_size is not a key; did you mean model.image_size?"),
        ("model.image_size=224,224", "-o model.image_size=224,224: a list needs brackets; write [224, 224]"),
        ("model.image_size=224x160", "-o model.image_size=224x160: a list needs brackets; write [224, 160]"),
        ("optim.betas=(0.9, 0.99)", "-o optim.betas=(0.9, 0.99): a list needs brackets; write [0.9, 0.99]"),
        ("optim.lr=1,2", "-o optim.lr=1,2: must be a number"),
        ("optim.lr=fast", "-o optim.lr=fast: must be a number"),
        ("optim={lr: fast}", "-o optim={lr: fast}: optim.lr = 'fast': must be a number"),
        ("train.epochs=0", "-o train.epochs=0: must be above 0"),
        ("model.pool=clsgap", "-o model.pool=clsgap: must be 'cls', 'gap', 'cls_gap' or 'map'; did you mean cls_gap?"),
        ("optim.lr=true", "-o optim.lr=true: must be a number, at least 0"),
        ("parallel.dp=true", "-o parallel.dp=true: must be a whole number, at least 1; or auto"),
        ("parallel.dp=two", "-o parallel.dp=two: must be a whole number, at least 1; or auto"),
        ("optim.betas=true", "-o optim.betas=true: must be a list [number, number], each at least 0, below 1"),
        ("data.mean=0.5", "-o data.mean=0.5: has 1 value, and model.num_channels is 3; set three values"),
        ("seed=1.5", "-o seed=1.5: must be a whole number"),
        ("model.pool=max", "-o model.pool=max: must be 'cls', 'gap', 'cls_gap' or 'map'"),
        ("augment.crop_scale=[0.5, 0.1]", "-o augment.crop_scale=[0.5, 0.1]: [0.5, 0.1] must be [min, max], both"),
    ],
)
def test_the_message_for_an_override_names_its_key_once_and_the_remedy(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    assert message_of(error).startswith(message)


@pytest.mark.parametrize("override", ["optim.lr", "", "=3", "optim.lr:3"])
def test_the_message_for_an_override_without_key_or_value_shows_the_format(override: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    assert message_of(error).startswith(f"-o {override}: must be section.key=value")


@pytest.mark.parametrize(
    "override",
    [
        "model=3",
        "optim.lr=fast",
        "optim.lr=*x",
        "optim.lr=[",
        "optim.lr.x=3",
        "a.b.c=3",
        "..=3",
        "optim.=3",
        ".lr=3",
        "optim.lr={a: 1}",
        "seed=1.5",
        "model.drop\nout=1",
        "no newline\nbut no equals sign",
        "seed=\x00",
    ],
)
def test_wrong_overrides_are_refused_in_one_line_that_names_them(override: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    assert message_of(error).startswith("-o")


def test_a_contradiction_is_attributed_to_the_overrides_that_it_names(load_text) -> None:
    text = "augment: {mixup_alpha: 1.0}\noptim: {lr: 1.0}"
    with pytest.raises(ConfigError) as error:
        load_text(text, "optim.lr=2", "data.global_batch_size=7")
    assert message_of(error).startswith("-o data.global_batch_size=7: augment.mixup_alpha and cutmix_alpha mix images")
    with pytest.raises(ConfigError) as error:
        load_text(text, "optim.decay_times_lr=false", "data.global_batch_size=8", "optim.lr=0")
    assert message_of(error).startswith("-o optim.decay_times_lr=false -o optim.lr=0: optim.decay_times_lr = False: ")
    with pytest.raises(ConfigError) as error:
        load_text(text + "\ndata: {mean: 0.5}", "optim.lr=2", "data.root=x")
    assert "run.yaml: data.mean: has 1 value" in message_of(error)


@pytest.mark.parametrize(
    ("override", "section", "value"),
    [
        ("optim.name=LAMB", "optim", "lamb"),
        ("optim.no_decay=[Bias, NORM]", "optim", ("bias", "norm")),
        ("parallel.pp_schedule=fthenb", "parallel", "FThenB"),
        ("parallel.dp=AUTO", "parallel", "auto"),
        ("data.prepare=Digits", "data", "digits"),
    ],
)
def test_choices_are_accepted_in_any_case(override: str, section: str, value: object) -> None:
    key = override.partition("=")[0].partition(".")[2]
    assert getattr(getattr(load_config(None, [override]), section), key) == value


def test_an_override_inside_a_value_is_refused(load_text) -> None:
    with pytest.raises(ConfigError) as error:
        load_text("model: 3", "model.depth=2")
    assert "model is not a section" in message_of(error)


def test_a_mistake_in_an_override_is_not_attributed_to_the_file(load_text) -> None:
    with pytest.raises(ConfigError) as error:
        load_text("optim: {lr: 1}", "optim.lr=-1")
    assert message_of(error).startswith("-o")
