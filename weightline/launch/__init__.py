"""Starts the ranks of a stage on one or several machines and follows them to their end. Free of Prefect."""
