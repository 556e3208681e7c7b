"""Starts the ranks of a stage on one or several machines, follows them, and ends them."""
