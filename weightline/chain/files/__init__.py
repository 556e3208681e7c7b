"""Checkpoint folders in and out of a chain."""
