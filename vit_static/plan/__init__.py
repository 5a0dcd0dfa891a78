"""Compile a run's program for any mesh without its GPUs and estimate its cost."""
