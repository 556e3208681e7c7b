"""Prefect tasks: the steps of flows, each of them thin and safe to repeat."""
