"""Scripts of what is measured against, each run by an interpreter of its own."""
