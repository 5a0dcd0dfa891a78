"""Creation of the small data set that a config comes with, when a run first needs it (`data.prepare`)."""

from __future__ import annotations

from pathlib import Path

from vit_static.common.errors import DataError, os_reason
from vit_static.common.io import lock
from vit_static.common.text import say
from vit_static.config.data_schema import DataConfig
from vit_static.data.digits import make_digits

_LABELS = {"digits": "digit", "digits_parity": "parity"}  # of `make_digits`, by data.prepare
_REMEDY = "call the command in another folder, or set data.root"
_MAX_WAIT_S = 300.0


def prepare_set(data: DataConfig) -> None:
    """Create the folder data.root if it doesn't exist and data.prepare names a data set; else do nothing.

    Of several processes, one creates it while the others wait. Raise DataError without scikit-learn, OSError if the
    folder can't be written.
    """
    root = Path(data.root)
    if data.prepare is None or root.exists():
        return
    parent = root.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"{root} can't be created ({os_reason(error)}); {_REMEDY}") from error
    try:
        with lock(parent, f"{parent} is in use by another process", _MAX_WAIT_S, announce=False):
            summary = make_digits(root, _LABELS[data.prepare], remedy=_REMEDY)
    except ValueError as error:
        raise DataError(f"{root}: can't be created: {error}") from error
    if not summary.already_existed:
        say(f"created {root}: {summary.describe()}")
