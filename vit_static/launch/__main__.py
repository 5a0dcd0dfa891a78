"""`python -m vit_static.launch VERB ...`: entry point of the launcher."""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # during these imports Ctrl-C ends the process without a traceback
    from vit_static.launch.launcher import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
