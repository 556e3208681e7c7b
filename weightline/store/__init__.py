"""Buckets behind one small protocol."""

from weightline.store.base import ObjectInfo, Store
from weightline.store.open import open_store

__all__ = ["ObjectInfo", "Store", "open_store"]
