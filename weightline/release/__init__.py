"""Publishes a version as a model: its folder, its model card, its repository on the Hub."""
