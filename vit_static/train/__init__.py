"""The training loop and its parts. `vit_static.train(config)` calls `vit_static.api.train`."""

import sys

from vit_static import CallablePackage

sys.modules[__name__].__class__ = CallablePackage
