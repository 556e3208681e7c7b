"""Writes a chain: drafts, commits, uploads and signatures."""
