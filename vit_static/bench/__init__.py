"""How quick this program is, as ratios to what a user would take instead, measured in one run; the verb `bench`."""
