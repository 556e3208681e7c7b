"""Computes content hashes of local files during their transfer.

hf_xet hashes files on one core and releases the interpreter lock meanwhile. A file is hashed beside its upload. A
download is hashed as the file grows: the client writes it from front to back, a thread copies the new bytes into a
pipe, and hf_xet reads the pipe by its path as it would read a file.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import hf_xet

#: Smaller files are hashed in less time than it takes to start threads.
_MIN_NBYTES = 2 * 2**20

_POLL_SECONDS = 0.002

_PIECE_NBYTES = 2**20

#: Bound of the wait for the hash. A process that was forked meanwhile holds the pipe open, so its end may never show.
END_SECONDS = 10.0


def xet_hash(path: Path) -> str:
    """Returns the content hash of a file that is complete and not empty."""
    return str(hf_xet.hash_files([str(path)])[0].hash)


def hash_beside(path: Path, work: Callable[[], None]) -> str:
    """Runs `work` and returns the hash of the file, computed at the same time.

    Errors of `work` take precedence. OSError when the file cannot be read.
    """
    if path.stat().st_size < _MIN_NBYTES:
        work()
        return xet_hash(path)
    hashing = _Hashing(path)
    hashing.start()
    try:
        work()
    finally:
        hashing.join()
    return hashing.xet_hash or xet_hash(path)


def hash_arriving(path: Path, nbytes: int, write: Callable[[], None], end_seconds: float = END_SECONDS) -> str:
    """Runs `write`, which fills the new file `path`, and returns the hash of the bytes as they were written.

    It is the hash of the file when `write` wrote each byte once and in order. If the hash does not match, hash the file
    again: `write` may have rewritten a range.
    """
    if nbytes < _MIN_NBYTES or sys.platform != "linux":  # others have no sendfile(2) into a pipe
        write()
        return xet_hash(path)
    path.touch()
    reader, writer = os.pipe()
    hashing, feeding = _Hashing(Path(f"/dev/fd/{reader}"), reader), _Feeding(path, writer)
    hashing.start()
    feeding.start()
    try:
        write()
    except BaseException:
        feeding.is_given_up = True
        raise
    finally:
        feeding.is_written.set()
        feeding.join()
        hashing.join(end_seconds)
    return hashing.xet_hash or xet_hash(path)


class _Hashing(threading.Thread):
    """Hashes the bytes read from a path. `xet_hash` is None before the end, and when the path cannot be read."""

    def __init__(self, path: Path, owned: int | None = None) -> None:
        super().__init__(name="weightline-hash", daemon=True)
        self.xet_hash: str | None = None
        self._path = path
        self._owned = owned

    def run(self) -> None:
        try:
            self.xet_hash = xet_hash(self._path)
        except (OSError, RuntimeError):
            return  # the caller hashes the file again, and that raises the error
        except KeyboardInterrupt:
            return  # hf_xet raises Ctrl-C in the thread that hashes; the main thread receives it as well
        finally:
            if self._owned is not None:
                os.close(self._owned)  # the pipe has no reader now, so the thread that fills it gets EPIPE and ends


class _Feeding(threading.Thread):
    """Sends a growing file into a pipe until it is written, then ends the pipe."""

    def __init__(self, path: Path, writer: int) -> None:
        super().__init__(name="weightline-feed", daemon=True)
        self.is_written = threading.Event()
        self.is_given_up = False
        self._path = path
        self._writer = writer

    def run(self) -> None:
        try:
            with self._path.open("rb") as file:
                self._follow(file.fileno())
        except OSError:
            # The pipe has no reader any more, or the file system lacks sendfile(2). The hash does not match then.
            return
        finally:
            os.close(self._writer)

    def _follow(self, file: int) -> None:
        position = 0
        while not self.is_given_up:
            is_last = self.is_written.is_set()  # read before the copy, so that bytes written before it was set are seen
            nbytes = os.sendfile(self._writer, file, position, _PIECE_NBYTES)
            position += nbytes
            if nbytes == 0:
                if is_last:
                    return
                self.is_written.wait(_POLL_SECONDS)
