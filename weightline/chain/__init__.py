"""The linear history of a model's weights in one bucket prefix."""

from weightline.chain.read.history import Chain, open_chain

__all__ = ["Chain", "open_chain"]
