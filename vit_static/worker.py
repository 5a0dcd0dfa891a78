"""One process of a verb, as the launcher and other launchers start it: `python -m vit_static.worker VERB ...`."""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` handles it: see __main__.command
    from vit_static.__main__ import main
    from vit_static.common.startup import use_utf8

    use_utf8()
    sys.exit(main())
