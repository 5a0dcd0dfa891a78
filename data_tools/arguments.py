"""Command-line arguments: the parser of all tools, and the options that train on a prepared dataset."""

import argparse
import shlex
from collections.abc import Mapping
from typing import NoReturn


class ToolParser(argparse.ArgumentParser):
    """A parser that raises ValueError for a wrong argument, where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (-h shows the arguments)")


def override_options(values: Mapping[str, object]) -> str:
    """Return the `-o` options that set these config keys, quoted for a shell."""
    return " ".join(f"-o {shlex.quote(f'{key}={value}')}" for key, value in values.items())
