"""What the process of helpers/forked_verbs.py imports before it is forked."""

# ruff: noqa: E402 - the process is set up first
# ruff: noqa: F401 - verbs find these imported

from __future__ import annotations

from vit_static.common.startup import prepare_process

prepare_process(verbose=True)

import vit_static.checkpoint.folder
import vit_static.checkpoint.writer
import vit_static.export.exporter
import vit_static.inference.predict
import vit_static.program.program
import vit_static.train.evaluate
import vit_static.train.trainer
import vit_static.weights.convert
