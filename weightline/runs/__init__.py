"""Runs of recipes: prepares them, and manages their folders, stages, progress and summaries."""
