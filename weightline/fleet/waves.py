"""Plans the waves in which replicas move: first a canary, on which the version is judged, then the others. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from weightline.errors import InputError


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """A replica that can be moved from here, and the version that it serves before the move."""

    name: str
    version: int | None


@dataclass(frozen=True, slots=True)
class WavePlan:
    """The names of replicas in the order of moving. `settled` replicas serve the version, or a later one, already."""

    waves: tuple[tuple[str, ...], ...]
    settled: tuple[str, ...]

    @property
    def canary(self) -> str | None:
        return self.waves[0][0] if self.waves else None


def plan_waves(
    members: Iterable[Member],
    version: int,
    *,
    wave_size: int,
    canary: str | None = None,
    allow_backward: bool = False,
) -> WavePlan:
    """Plans the canary alone, then waves of at most `wave_size`, by name.

    `canary` names the first replica; without it the one that is furthest behind moves first, since it gets most of the
    changes. A replica that serves a later version stays there unless `allow_backward`. InputError for a canary that
    cannot be moved from here.
    """
    if wave_size < 1:
        raise InputError(f"wave_size is {wave_size}: name 1 or more", field="wave_size")
    all_members = sorted(members)
    to_move = [member for member in all_members if _is_to_move(member, version, allow_backward)]
    settled = tuple(member.name for member in all_members if member not in to_move)
    if not to_move:
        return WavePlan((), settled)
    first = _canary(to_move, canary)
    if canary is not None and first.name != canary and canary not in settled:
        names = ", ".join(member.name for member in all_members)
        raise InputError(f"canary: no replica {canary!r} can be moved from here: name one of {names}", field="canary")
    rest = [member.name for member in to_move if member != first]
    later = (tuple(rest[at : at + wave_size]) for at in range(0, len(rest), wave_size))
    return WavePlan(((first.name,), *later), settled)


def _is_to_move(member: Member, version: int, allow_backward: bool) -> bool:
    if member.version is None or member.version < version:
        return True
    return allow_backward and member.version != version


def _canary(to_move: Sequence[Member], wanted: str | None) -> Member:
    named = next((member for member in to_move if member.name == wanted), None)
    return named or min(to_move, key=lambda member: (member.version is None, member.version, member.name))
