"""Environments for multi-turn rollouts, which run as OpenEnv servers of their own. Imports no torch."""

from __future__ import annotations

#: Name of the built-in environment on the command line.
WORD_GAME = "word-game"
