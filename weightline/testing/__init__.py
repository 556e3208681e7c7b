"""Helpers for tests of programs that use weightline. The package itself does not import them."""
