"""One process of a verb, as the launcher and other launchers start it: `python -m vit_static.worker VERB ...`."""

from __future__ import annotations

import sys

from vit_static.__main__ import main
from vit_static.common.startup import use_utf8

if __name__ == "__main__":
    use_utf8()
    sys.exit(main())
