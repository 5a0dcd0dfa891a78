"""Optimizers, parameter groups, schedules, gradient clipping."""
