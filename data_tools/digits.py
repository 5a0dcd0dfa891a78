"""Command line of `data digits`: see `vit_static.data.digits`."""

from collections.abc import Sequence
from pathlib import Path

from vit_static.common.text import print_line
from vit_static.data.digits import CLASS_NAMES, MIN_SIZE, make_digits

from .arguments import ToolParser

DEFAULT_ROOTS = {"digit": Path("data/digits"), "parity": Path("data/digits_parity")}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Raise ValueError for a wrong argument."""
    parser = ToolParser("digits", description="Write handwritten digits as JPEG files.")
    parser.add_argument("--labels", choices=list(CLASS_NAMES), default="digit",
                        help="the ten digits, or the two classes even and odd (default: digit)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="folder to create (default: data/digits, or data/digits_parity for parity)")  # fmt: skip
    parser.add_argument("--size", type=int, default=80, help=f"pixels per side, at least {MIN_SIZE} (default: 80)")
    arguments = parser.parse_args(argv)

    summary = make_digits(arguments.out or DEFAULT_ROOTS[arguments.labels], arguments.labels, arguments.size)
    print_line(
        f"digits: {summary.describe()} of {arguments.size}x{arguments.size} pixels "
        f"{'are already' if summary.already_existed else 'written'} in {summary.root}"
    )
    return 0
