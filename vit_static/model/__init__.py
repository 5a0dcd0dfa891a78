"""The Vision Transformer, its variants and losses."""
