"""Worker processes of the benchmarks: `python -m vit_static.bench.worker KIND SPEC`, started by the harness.

KIND is step, data or infer. SPEC is JSON: the resolved config for step and data, the spec of infer.py for infer.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence

from vit_static.common.errors import EXIT_DONE, EXIT_FAILED
from vit_static.common.library_output import library_output
from vit_static.common.startup import prepare_process
from vit_static.common.text import print_text

KINDS = ("step", "data", "infer")
NUM_LINES = 40  # of library output, shown when a worker fails


def main(argv: Sequence[str]) -> int:
    """Run one worker until its standard input ends; an error leaves its traceback on stderr for the harness."""
    kind, spec = argv
    prepare_process()  # before Paddle is imported: by the modules below, hence these local imports
    try:
        _serve(kind, json.loads(spec))
    except Exception:
        print_text(library_output(NUM_LINES), sys.stderr)
        traceback.print_exc()
        return EXIT_FAILED
    return EXIT_DONE


def _serve(kind: str, spec: dict[str, object]) -> None:
    from vit_static.config.schema import Config

    if kind == "step":
        from vit_static.bench import step

        step.serve(Config.model_validate(spec))
    elif kind == "data":
        from vit_static.bench import data

        data.serve(Config.model_validate(spec))
    elif kind == "infer":
        from vit_static.bench import infer

        infer.serve(spec)
    else:
        raise ValueError(f"{kind}: not a kind of worker; there are {', '.join(KINDS)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
