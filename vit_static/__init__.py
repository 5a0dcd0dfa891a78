"""Vision Transformers on PaddlePaddle: a static, auto-parallel program, fed by DALI."""

__version__ = "0.1.0"
