"""Parses the output of ranks: finds the rank of a line, the lines that a log shows, and the cause of a failure. Pure.

With --tee, torchrun begins each line of rank N with "[defaultN]:".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_RANK_PREFIX = re.compile(r"^\[default(\d+)\]:(?:\[rank\d+\]: ?)?")
_ROOT_CAUSE = re.compile(
    r"Root Cause \(first observed failure\):.*?rank\s*: (\d+).*?exitcode\s*: (-?\d+)([^\n]*)", re.DOTALL
)
_SIGNAL = re.compile(r"\((SIG[A-Z]+)\)")
#: Progress bars, which overwrite one line of a terminal.
_PROGRESS_BAR = re.compile(r"\d+%\|")
MAX_TAIL_LINES = 25


@dataclass(frozen=True, slots=True)
class RankLine:
    """One line of output. `rank` is None for a line of the launcher."""

    rank: int | None
    text: str

    @property
    def labeled(self) -> str:
        return self.text if self.rank is None else f"[rank {self.rank}] {self.text}"


def parse_line(raw: str) -> RankLine:
    """Parses one line: "[default1]:loading" is "loading" of rank 1."""
    line = raw.rstrip("\r\n")
    found = _RANK_PREFIX.match(line)
    return RankLine(int(found[1]), line[found.end() :]) if found else RankLine(None, line)


@dataclass(slots=True)
class LineGate:
    """Limits the rate of lines: `burst` at once, then `lines_per_second`. Repetitions and progress bars never pass."""

    lines_per_second: float = 5.0
    burst: float = 50.0
    num_held_back: int = 0
    _allowance: float = field(init=False)
    _last_seconds: float | None = field(init=False, default=None)
    _last_text: str = field(init=False, default="")

    def __post_init__(self) -> None:
        self._allowance = self.burst

    def passes(self, line: RankLine, now_seconds: float) -> bool:
        """Returns whether to show the line. `now_seconds` never decreases."""
        if not line.text.strip() or line.text == self._last_text or _PROGRESS_BAR.search(line.text):
            return False
        self._last_text = line.text
        elapsed = 0.0 if self._last_seconds is None else now_seconds - self._last_seconds
        self._last_seconds = now_seconds
        self._allowance = min(self.burst, self._allowance + elapsed * self.lines_per_second)
        if self._allowance < 1:
            self.num_held_back += 1
            return False
        self._allowance -= 1
        return True


@dataclass(frozen=True, slots=True)
class Failure:
    """The cause of a failure. `tail` holds the last lines of the rank that failed first, or else of all ranks."""

    rank: int | None
    cause: str
    tail: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"{self.cause}. Its last lines:", *(f"    {line}" for line in self.tail)])


def explain_failure(lines: Sequence[RankLine], returncode: int) -> Failure:
    """Finds the rank that failed first and its last lines. `lines`: the newest lines, oldest first."""
    found = _ROOT_CAUSE.search("\n".join(line.text for line in lines if line.rank is None))
    if found is None:
        return Failure(None, f"the launcher ended with exit code {returncode}", _last(lines, is_labeled=True))
    rank, exitcode = int(found[1]), int(found[2])
    signal = _SIGNAL.search(found[3])
    how = f"was ended by {signal[1]}" if signal else f"ended with exit code {exitcode}"
    return Failure(rank, f"rank {rank} {how}", _last(line for line in lines if line.rank == rank))


def _last(lines: Iterable[RankLine], *, is_labeled: bool = False) -> tuple[str, ...]:
    shown = [line for line in lines if line.text.strip() and not _PROGRESS_BAR.search(line.text)]
    texts = (line.labeled if is_labeled else line.text for line in shown[-MAX_TAIL_LINES:])
    return tuple(texts) or ("(it printed nothing)",)
