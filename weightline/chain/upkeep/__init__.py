"""Keeps a chain in shape: compact, expire, collect garbage, verify."""
