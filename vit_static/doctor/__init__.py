"""The verb `doctor`: checks of a config on the user's own devices before a long run."""
