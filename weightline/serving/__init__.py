"""Replicas: running engines that follow a chain. This package and its `client` import no torch."""
