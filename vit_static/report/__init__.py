"""A run's HTML report and error analysis."""
