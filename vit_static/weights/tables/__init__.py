"""Tables of names of other programs' weight files, one module per family."""
