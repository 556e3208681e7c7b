"""Maintains a chain: compacts it, expires history, collects garbage, verifies it."""
