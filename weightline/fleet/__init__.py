"""Finds the replicas of a chain and moves them to a version in waves. Imports no Prefect."""
