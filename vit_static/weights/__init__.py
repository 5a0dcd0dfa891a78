"""Read, convert and load weights of every supported format."""
