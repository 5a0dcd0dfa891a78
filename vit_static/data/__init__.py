"""Datasets, sampling, augmentation and the DALI pipeline."""
