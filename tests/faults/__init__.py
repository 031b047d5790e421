"""Faults tried on the training program itself: `python -m tests.faults --help`."""
