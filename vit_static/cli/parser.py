"""The parser of all verbs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

import vit_static
from vit_static.cli import bench_verbs, model_verbs, reference_verbs, training_verbs
from vit_static.cli.arguments import HelpFormatter, Parser
from vit_static.cli.mistakes import check_flags, check_words, describe_unknown
from vit_static.common.errors import UserError
from vit_static.common.text import program_name

_EPILOG = """Examples:
  {program} pretrain                     Train the quickstart's model, with images that the run creates.
  {program} finetune -c own_images ...   Train on your own images; 'recipes' lists all configs.
  {program} config lr                    Explain a config key.
  {program} help VERB                    Explain a verb."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line; its `handler` runs the verb. Raise UserError for a wrong argument."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"]:  # `__main__.command` answers "help data"
        words = [*words[1:], "--help"]
    parser = make_parser()
    verbs = verbs_of(parser)
    check_words(words, verbs)
    verb = _verb_of(words, verbs)
    if verb is not None:
        check_flags(words, verb)
    arguments, unknown = parser.parse_known_args(words)
    if unknown and verb is not None:
        raise UserError(describe_unknown(unknown, verb))
    return arguments


def _verb_of(words: Sequence[str], verbs: Mapping[str, argparse.ArgumentParser]) -> argparse.ArgumentParser | None:
    """Return the parser of the verb, or of its benchmark, that the words begin with; None if they begin with a flag."""
    verb = verbs.get(words[0]) if words else None
    return verb if verb is None else verbs_of(verb).get(words[1] if len(words) > 1 else "", verb)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs, in the order in which --help lists them."""
    program = program_name()
    parser = Parser(
        prog=program,
        description="Vision Transformers: train, evaluate, export, predict.",
        epilog=_EPILOG.format(program=program),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-V", "-v", "--version", action="version", version=f"vit_static {vit_static.__version__}")
    parser.set_defaults(parser=parser)  # for `completion`
    subparsers = parser.add_subparsers(title="verbs", dest="verb", required=True, metavar="VERB", parser_class=Parser)
    reference_verbs.add_run_sh(subparsers)
    training_verbs.add_all(subparsers)
    model_verbs.add_all(subparsers)
    reference_verbs.add_all(subparsers)
    bench_verbs.add_all(subparsers)
    return parser


def verbs_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of the verbs, or of the benchmarks of `bench`, by name; empty if it has none."""
    actions = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    action = next(actions, None)
    return {} if action is None else dict(action.choices)
