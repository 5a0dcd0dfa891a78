"""Command line: the parser of all verbs, their examples, and answers to mistakes."""
