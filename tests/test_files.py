from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from weightline.files import exclusive_lock, sha256_of, write_atomically


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "facts.json"
    write_atomically(path, "one")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "two \ud800")
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]


def test_the_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert sha256_of(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


_HOLD = (
    "import sys; from pathlib import Path; from weightline.files import exclusive_lock\n"
    "with exclusive_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
)


@pytest.mark.process
def test_a_lock_excludes_other_processes_and_goes_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match="locked by another process"), exclusive_lock(path):
            pytest.fail("two processes hold the lock")
        holder.kill()
    with exclusive_lock(path):
        assert path.exists()


def test_what_the_block_raises_is_its_own(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError, match="the block's"), exclusive_lock(tmp_path / "lock"):
        raise BlockingIOError("the block's")
