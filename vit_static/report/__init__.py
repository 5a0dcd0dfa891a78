"""The HTML report of a run, and the analysis of the errors of its model."""
