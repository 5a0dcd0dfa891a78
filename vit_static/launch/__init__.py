"""Start a verb in one or many processes."""
