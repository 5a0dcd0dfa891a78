"""Optimizers, parameter groups, learning-rate schedules, gradient clipping, and the average of the weights."""
