"""What the tests of the front share."""

from tests.serving.conftest import _one_thread, grown

__all__ = ["_one_thread", "grown"]
