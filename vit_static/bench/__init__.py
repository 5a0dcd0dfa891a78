"""Benchmarks against peers: ratios measured in one run."""
