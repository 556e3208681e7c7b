"""A download that was cut goes on where it stopped, when the object is still the same.

A note beside the file says of which object it is a part, and how many of its first bytes are there; it goes when the
file is whole. The note decides nothing about trust: whoever needs the bytes checks their sha256.
"""

from __future__ import annotations

from pathlib import Path


def note_of(path: Path) -> Path:
    """Where the note of the partial file at `path` stands."""
    return path.with_name(f"{path.name}.resume")


def num_bytes_done(path: Path, identity: str) -> int:
    """How many first bytes of the object `identity` stand at `path`; starts the file over when it is another's.

    `identity` is one line that names the object's content: key, entity tag and size.
    """
    try:
        noted, _, done = note_of(path).read_text().partition("\n")
        if noted == identity and path.stat().st_size >= int(done):
            return int(done)
    except (FileNotFoundError, ValueError):
        pass
    path.write_bytes(b"")
    return 0


def note_done(path: Path, identity: str, nbytes: int) -> None:
    """The first `nbytes` of the object are there."""
    note_of(path).write_text(f"{identity}\n{nbytes}")


def finish(path: Path) -> None:
    """The file is whole. Safe to repeat."""
    note_of(path).unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove a partial file and its note. Safe to repeat."""
    path.unlink(missing_ok=True)
    note_of(path).unlink(missing_ok=True)
