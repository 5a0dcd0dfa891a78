"""`python -m vit_static.launch VERB ...`: entry point of the launcher."""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    # Until the verb or the launcher handles it, Ctrl-C ends the process at once: there is nothing to save, and Python's
    # own handler would print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from vit_static.common.library_output import best_effort
    from vit_static.common.startup import use_utf8

    use_utf8()
    sys.stderr = best_effort(sys.stderr)
    from vit_static.launch.launcher import main

    sys.exit(main())
