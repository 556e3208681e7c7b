"""Benchmarks of codings on given checkpoints, and estimates of the costs of a cluster."""
