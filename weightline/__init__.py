"""Post-training in which every weight update is a commit."""

__version__ = "0.1.0"
