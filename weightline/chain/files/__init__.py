"""Reads checkpoint folders into a chain, and writes versions as checkpoint folders."""
