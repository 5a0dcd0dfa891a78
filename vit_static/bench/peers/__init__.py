"""Scripts of the peers that the benchmarks compare with, each run by the interpreter of its own environment."""
