"""The argument parser that every tool of this folder uses."""

import argparse
from typing import NoReturn


class ToolParser(argparse.ArgumentParser):
    """Raises ValueError for a wrong argument, where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (-h shows the arguments)")
