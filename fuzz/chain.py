"""Replaces one object of a chain by fuzzed bytes: verify must report, and readers must succeed or raise a typed error.

python -m fuzz.chain -max_total_time=60

The chain is the newest one of tests/compat. The first byte of an input chooses the object, the rest replaces it.
"""

from __future__ import annotations

import atheris

from fuzz.inputs import ROOT, fuzz

with atheris.instrument_imports(include=["weightline"]):
    from weightline.chain.read.history import Chain
    from weightline.chain.read.refs import current_refs
    from weightline.chain.replay.state import read_state
    from weightline.chain.upkeep.verify import verify_chain
    from weightline.errors import WeightlineError
    from weightline.store.memory import MemoryStore

_FOLDER = max(path for path in (ROOT / "tests" / "compat" / "data").iterdir() if path.is_dir())
_OBJECTS = {str(path.relative_to(_FOLDER)): path.read_bytes() for path in _FOLDER.rglob("*") if path.is_file()}
_KEYS = sorted(_OBJECTS)


def one_input(data: bytes) -> None:
    store = MemoryStore()
    for key, body in (_OBJECTS | {_KEYS[(data or b"\0")[0] % len(_KEYS)]: data[1:]}).items():
        store.put(key, body)
    verify_chain(Chain(store))
    for read in (current_refs, lambda chain: read_state(chain, chain.versions()[-1])):
        try:
            read(Chain(store))
        except WeightlineError:
            continue


def seeds() -> list[bytes]:
    """Returns inputs that replace each object by itself."""
    return [bytes([number]) + _OBJECTS[key] for number, key in enumerate(_KEYS)]


if __name__ == "__main__":
    fuzz("chain", one_input, seeds())
