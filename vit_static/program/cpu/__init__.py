"""oneDNN kernels for compiled programs on CPUs."""
