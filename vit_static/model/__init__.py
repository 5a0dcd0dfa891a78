"""Vision Transformer, its variants and its losses."""
