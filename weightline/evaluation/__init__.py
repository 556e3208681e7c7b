"""Measures scores of versions by lm-evaluation-harness and records them in the bucket. Planning needs no torch."""
