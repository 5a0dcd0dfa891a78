"""The parser: help of every verb, answers to mistakes; and the verbs that explain the program."""

from __future__ import annotations

import argparse
import configparser
import errno
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.forked_verbs import start_verb
from helpers.small import ROOT

from vit_static import verbs
from vit_static.cli.parser import make_parser, parse_arguments, verbs_of
from vit_static.cli.run import main
from vit_static.common.errors import UserError
from vit_static.common.installation import EXTRAS
from vit_static.config.loader import load_config
from vit_static.config.print_reference import print_recipes
from vit_static.config.recipes import list_recipes
from vit_static.config.yaml_loader import read_yaml
from vit_static.model.variants import VARIANTS, print_variants
from vit_static.program.cpu import onednn


def leaf_verbs() -> dict[str, argparse.ArgumentParser]:
    verbs = verbs_of(make_parser())
    benches = verbs_of(verbs.pop("bench"))
    return verbs | {f"bench {name}": parser for name, parser in benches.items()}


VERBS = leaf_verbs()


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    arguments = parse_arguments(words)
    assert arguments.handler(arguments) == 0
    return capsys.readouterr().out


# Help


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_full_sentences_and_two_examples_that_are_accepted(verb: str) -> None:
    parser = VERBS[verb]
    shown_name = {"train": "pretrain"}.get(verb, verb)
    text = parser.format_help()
    assert text.startswith(f"usage: ./run.sh {shown_name} ")
    for sentence in [parser.description, *(action.help for action in parser._actions)]:
        assert sentence == argparse.SUPPRESS or re.match(r"[A-Z]|show this|ImageNet|auto|gpu: [A-Z]", sentence)
        assert sentence == argparse.SUPPRESS or sentence.endswith((".", "exit")), sentence
    examples = text.partition("Examples:\n")[2].splitlines()
    assert len(examples) >= 2
    for example in examples:
        words = shlex.split(example.split("|")[0].split(">")[0])
        words = words[words.index("./run.sh") + 1 :]
        assert words[: len(shown_name.split())] == shown_name.split()
        if words[0] in ("setup", "test", "data") or "--help" in words:
            continue
        arguments = parse_arguments(words)
        if getattr(arguments, "config", None) is not None:
            path = arguments.config
            load_config(ROOT / path if path.parts[0] == "configs" else path, arguments.overrides)


def test_help_lists_every_verb_and_no_line_is_wider_than_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text, _, _ = make_parser().format_help().partition("Examples:")
    assert all(re.search(rf"[ (]{name.split()[0]}\b", text) for name in VERBS)
    assert max(map(len, text.splitlines())) <= 40


@pytest.mark.parametrize(
    "words", [("help",), ("--help",), ("help", "bench", "train"), ("help", "config"), ("train", "-h")]
)
def test_help_is_printed(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(words)
    assert ended.value.code == 0 and "Examples:\n" in capsys.readouterr().out


def test_help_of_data_lists_its_tools(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "vit_static/__main__.py", "help", "data"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "  folder       split your own images" in done.stdout and "  imagenet21k  list" in done.stdout


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--version"])
    assert re.fullmatch(r"vit_static \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_another_entry_point_has_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vit_static.common.text.COMMAND", "vit_static")
    text = verbs_of(make_parser())["pretrain"].format_help()
    assert text.startswith("usage: vit_static pretrain ") and "./run.sh" not in text


@pytest.mark.parametrize("environ", [{}, {"PADDLE_CURRENT_ENDPOINT": "127.0.0.1:1"}], ids=["alone", "of a launcher"])
def test_the_entry_point_can_be_run_as_a_file(tmp_path: Path, environ: dict[str, str]) -> None:
    """From any folder, as paddle.distributed.launch does. A process that it started doesn't start a launcher."""
    command = [sys.executable, "-v", ROOT / "vit_static/__main__.py", "pretrain", "--help"]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=inherited | environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr[-2000:]
    assert ("import 'vit_static.launch.launcher'" in done.stderr) == (not environ)


def test_train_is_pretrain() -> None:
    given, other = parse_arguments(["train", "-o", "seed=1"]), parse_arguments(["pretrain", "-o", "seed=1"])
    assert (given.handler, given.config, given.overrides) == (other.handler, other.config, other.overrides)


def test_a_finetune_without_weights_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, overrides in (("pretrain", []), ("finetune", ["init.from=vit.npz"])):
        verbs._note_missing_weights(verb, load_config(None, overrides))
    assert capsys.readouterr().err == ""
    verbs._note_missing_weights("finetune", load_config("own_images"))
    assert "note: init.from is not set, so this trains from scratch" in capsys.readouterr().err


def test_gpus_are_named_in_any_case() -> None:
    assert parse_arguments(["plan", "-c", "deit_s16", "--device", "H200"]).device == "h200"


# Mistakes


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("trian", "trian is not a verb; did you mean train?"),
        ("help trian", "trian is not a verb; did you mean train?"),
        ("pretrian", "did you mean pretrain?"),
        ("qqqq", "'./run.sh --help' lists the verbs"),
        ("attend one.png", "the verb attend is now called visualize: ./run.sh visualize"),
        ("pretrain -o seed=1 optim.lr=2", "-o takes one key; write -o seed=1 -o optim.lr=2"),
        ("pretrain -o optim.lr=1,train.epochs=3", "-o takes one key; write -o optim.lr=1 -o train.epochs=3"),
        ("pretrain -o 'seed=1; optim.lr=2'", "-o takes one key; write -o seed=1 -o optim.lr=2"),
        ("pretrain --image-size 224,160", "-o 'model.image_size=[224,160]'"),
        ("pretrain --image-size=224x160", "-o 'model.image_size=[224,160]'"),
        ("pretrain -o 'optim.betas=[0.9, 0.99]' seed=1", "write -o 'optim.betas=[0.9, 0.99]' -o seed=1"),
        ("visualize --model m -o seed=1 optim.lr=2 one.png", "-o takes one key; write -o seed=1 -o optim.lr=2"),
        ("pretrain -o optim.name = sgd", "-o takes key=value without spaces; write -o optim.name=sgd"),
        ("pretrain -o optim.name= sgd -o seed=1", "without spaces; write -o optim.name=sgd"),
        ("config -o head_bias =-10 seed=1", "-o takes one key; write -o head_bias=-10 -o seed=1"),
        ("pretrain -c quickstart optim.lr=0.1", "config keys are set with -o; write -o optim.lr=0.1"),
        ("pretrain optim.name = sgd optim.lr = 0.1", "set with -o; write -o optim.name=sgd -o optim.lr=0.1"),
        ("visualize --model m optim.lr=2 one.png", "config keys are set with -o; write -o optim.lr=2"),
        ("config optim.lr=0.1", "config keys are set with -o; write -o optim.lr=0.1"),
        ("bench train optim.lr=-1", "config keys are set with -o; write -o optim.lr=-1"),
        ("pretrain optm.lr=0.1", "optm.lr=0.1: config keys are set with -o; write -o optm.lr=0.1"),
        ("optim.lr=0.1", "a verb comes first, and config keys after -o: ./run.sh pretrain -o optim.lr=0.1"),
        ("pretrain --fp16", "--fp16 is not an option; config keys are set with -o: -o amp.dtype=float16"),
        ("pretrain --amp", "--amp is not an option; config keys are set with -o: -o amp.level=O1"),
        ("pretrain --optim.lr=1e-3", "--optim.lr is not an option; config keys are set with -o: -o optim.lr=1e-3"),
        ("pretrain --epochs 3", "config keys are set with -o: -o train.epochs=3"),
        ("pretrain --learning-rate=0.1", "config keys are set with -o: -o optim.lr=0.1"),
        ("pretrain --batch-size", "config keys are set with -o: -o data.global_batch_size=VALUE"),
        ("pretrain --resum never", "--resum is not an option of ./run.sh pretrain; did you mean --resume?"),
        ("predict --model m --top_k 3 one.png", "did you mean --top-k?"),
        ("bench train --round 3", "--round is not an option of ./run.sh bench train; did you mean --rounds?"),
        ("plan --gpus 16", "--gpus is not an option of ./run.sh plan; did you mean --world?"),
        ("pretrain --gpus 2", "NPROC=N sets the number of processes"),
        ("export --checkpoint run --output x", "did you mean --out?"),
        ("export --output=x", "did you mean --out?"),
        ("predict --checkpoint m one.png", "did you mean --model?"),
        ("convert --model x", "--model is not an option of ./run.sh convert"),
        ("completion", "./run.sh completion needs bash|zsh, as in: ./run.sh completion bash >>"),
        ("completion fish", "invalid choice: 'fish'"),
        ("export --out x", "./run.sh export needs --checkpoint, as in: ./run.sh export --checkpoint output/quickstart"),
        ("serve --model m --optim.lr=3", "'./run.sh serve --help' lists the arguments"),
        ("pretrain quickstart", "quickstart: unexpected argument"),
        ("bench", "./run.sh bench needs BENCHMARK, as in: ./run.sh bench train --rounds 3"),
        ("bench nothing", "invalid choice: 'nothing'"),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_with_the_correct_form(line: str, answer: str) -> None:
    with pytest.raises(UserError) as error:
        parse_arguments(shlex.split(line))
    assert answer in str(error.value)


def test_words_that_only_look_like_keys_are_accepted() -> None:
    arguments = parse_arguments(["visualize", "--model", "m", "-o", "seed=1", "a=b.png"])
    assert arguments.images == [Path("a=b.png")]


# Verbs that explain the program


def test_config_explains_keys(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "config", "optim.lr")
    assert re.search(r"^Key +Type +Default +Meaning$", text, re.MULTILINE)
    assert re.search(r"^optim\.lr +number, at least 0 +0\.001 +peak learning rate$", text, re.MULTILINE)
    assert "augment.random_erasing_probability" in printed(capsys, "config", "random", "erasing")
    assert len(printed(capsys, "config").splitlines()) > 100


def test_config_compares_with_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "config", "--diff", "-c", "quickstart", "-o", "seed=3")
    assert re.search(r"^seed +0 +3$", text, re.MULTILINE) and "data.root" in text and "kernels." not in text
    text = printed(capsys, "config", "-c", "quickstart")
    assert read_yaml(text)["data"]["root"] == "data/digits"
    for words in (["config", "--diff"], ["config", "optim", "-c", "quickstart"], ["config", "qqqq"]):
        with pytest.raises(UserError):
            printed(capsys, *words)


def test_models_lists_every_variant(capsys: pytest.CaptureFixture[str]) -> None:
    """Parameters and multiply-adds as in timm's results for these models at 224 pixels (vit_*_patch16_224)."""

    def rows_of(*options: str) -> dict[str, list[str]]:
        lines = printed(capsys, "models", *options).splitlines()[1:]
        return {line.split()[0]: line.split() for line in lines}

    rows = rows_of()
    assert list(rows) == list(VARIANTS)
    for name, millions, giga_macs in (("Ti/16", 5.7, 1.26), ("S/16", 22.1, 4.61), ("B/16", 86.6, 17.58)):
        assert float(rows[name][1]) == millions
        assert float(rows[name][3]) == pytest.approx(2 * giga_macs, rel=0.01)
    assert float(rows_of("--image-size", "384")["B/16"][1]) == 86.9
    assert list(rows_of("s/")) == ["S/16", "S/32"]


def test_recipes_lists_every_config_that_trains_with_task_result_and_machine(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = printed(capsys, "recipes")
    names = {path.stem for path in (ROOT / "configs").glob("*.yaml")} - {"bench_s16"}
    assert {line.split()[0] for line in text.splitlines()[1:]} == names
    for recipe in list_recipes():
        assert recipe.task and recipe.machine
        assert recipe.top1 or recipe.name.startswith(("own_images", "ViT_large_patch16_224_in21k"))
    with pytest.raises(UserError, match=r"no recipe mentions nothing and deit; '.* recipes' lists all"):
        print_recipes(["nothing", "deit"])
    with pytest.raises(UserError, match="no variant mentions S/15; the variants are Ti/16, S/16, "):
        print_variants(224, 1000, ["S/15"])
    few = printed(capsys, "recipes", "DINOv3", "linear").splitlines()[1:]
    assert [line.split()[0] for line in few] == ["dinov3_b16_linear_in1k", "dinov3_s16_linear_in1k"]
    by_name = {recipe.name: recipe for recipe in list_recipes()}
    assert by_name["deit_s16"].top1 == "79.9 % (published)" and by_name["deit_s16"].machine == "8 x A100 40 GB"
    assert by_name["quickstart"].top1 == "at least 97.5 % (measured)"


def test_a_missing_package_of_an_extra_is_one_line(tmp_path: Path) -> None:
    output = tmp_path / "stderr"
    hidden = "import sys; sys.modules['starlette'] = None"
    verb = start_verb(["serve", "--model", "x"], tmp_path, tmp_path / "stdout", output, before=hidden)
    assert verb.wait() == 2
    assert output.read_text() == "vit_static: starlette is not installed; run ./run.sh setup\n"


def test_the_extras_of_packages_are_those_of_setup_cfg() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    for package, extra in EXTRAS.items():
        lines = config["options.extras_require"][extra].splitlines()
        assert any(line.replace("-", "_").startswith(package) for line in lines), package


@pytest.mark.parametrize(
    ("error", "is_one_line"),
    [
        (MemoryError(), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("Error in CPU operator `fn.resize`: std::bad_alloc"), True),
        (RuntimeError("Resource temporarily unavailable"), True),  # of DALI, for a thread
        (
            RuntimeError("1. C++\nError: (error code is x.so: failed to map segment)\n1. Check if CUDA is installed"),
            True,
        ),
        (RuntimeError("CUDA runtime error: failed to allocate 12 GB"), False),  # whose details the traceback has
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), False),
        (RuntimeError("something else"), False),
    ],
    ids=lambda value: str(value)[:30],
)
def test_exhausted_memory_is_one_line(
    error: Exception, is_one_line: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(verbs, "run_models", fail)
    assert main(["models"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert (len(lines) == 1 and lines[0].startswith("vit_static: out of memory (")) == is_one_line
    assert ("Traceback" in "".join(lines)) != is_one_line and (not is_one_line or "1. C" not in lines[0])


def test_onednns_want_of_memory_is_known() -> None:
    with pytest.raises(MemoryError, match="dnnl_primitive_create"):
        onednn.check("primitive_create", 1)
