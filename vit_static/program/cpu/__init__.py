"""oneDNN kernels for compiled programs on CPUs.

pass_list.py ("oneDNN kernels") calls lowering.lower, which simplifies the program (simplify), finds patterns (patterns)
and replaces them by custom operators (custom_ops) that run attention and onednn.
"""
