"""Reading, conversion and loading of weights of every supported format."""
