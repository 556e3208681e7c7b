"""Publishes a version as a model: the model card and the Hub repository."""
