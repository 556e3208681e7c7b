"""Scores of versions, measured by lm-evaluation-harness and recorded beside the chain. Planning them needs no torch."""
