"""Errors, files, process start-up and other basics shared by every folder."""
