"""Reads a chain: manifests, refs, records and leases."""
