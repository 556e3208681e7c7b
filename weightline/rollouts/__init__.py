"""Completions for training from replicas that serve the versions of a chain. Imports no torch."""
