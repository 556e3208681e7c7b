"""The front of many replicas: one URL that sends every request to a replica that may and can answer it."""
