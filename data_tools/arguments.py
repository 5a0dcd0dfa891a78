"""Command-line arguments: the parser of all tools, and the options that train on a prepared dataset."""

import argparse
import shlex
from collections.abc import Mapping
from typing import NoReturn

from pydantic import ValidationError

from vit_static.common.text import program_name
from vit_static.config.data_schema import DataConfig


class ToolParser(argparse.ArgumentParser):
    """A parser that raises ValueError for a wrong argument, where argparse would print its usage and exit."""

    def __init__(self, tool: str, description: str) -> None:
        super().__init__(prog=f"{program_name()} data {tool}", description=description)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (-h shows the arguments)")


def override_options(values: Mapping[str, object]) -> str:
    """Return the `-o` options that set these config keys, quoted for a shell."""
    return " ".join(f"-o {shlex.quote(f'{key}={value}')}" for key, value in values.items())


def add_label_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how tables and lists are read; `data_config` reads them."""
    parser.add_argument("--path-column", metavar="NAME", help="tables: as data.path_column (default: path)")
    parser.add_argument(
        "--label-column", action="append", metavar="NAME",
        help="tables: as data.label_column (default: label); once for each class if there is one column per class",
    )  # fmt: skip
    parser.add_argument("--label-separator", metavar="TEXT", help="tables: as data.label_separator")
    parser.add_argument(
        "--label-type", choices=["auto", "number", "name"], help="tables: as data.label_type (default: auto)"
    )
    parser.add_argument(
        "--first-label", type=int, choices=[0, 1], help="lists, tables: as data.first_label (default: 0)"
    )


def data_config(arguments: argparse.Namespace) -> DataConfig:
    """Return the dataset that the arguments `root`, `train`, `val` and those of `add_label_arguments` describe.

    Images may have several labels. Raise ValueError, in one line, for a value that isn't valid.
    """
    names = ("path_column", "label_column", "label_separator", "label_type", "first_label")
    values = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if len(values.get("label_column", [])) == 1:
        values["label_column"] = values["label_column"][0]
    try:
        return DataConfig(
            root=str(arguments.root), train=arguments.train, val=arguments.val, multi_label=True, **values
        )
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
