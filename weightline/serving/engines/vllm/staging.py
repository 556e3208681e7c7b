"""Changes made ready for one worker, and written: all that can be done before the pause is done before it.

Staging finds where each changed element lives here and checks that the memory holds the old bits. Writing is one
indexed copy a place, and a read back. The digest of what a worker wrote is that of the changes it staged, which the
read back ties to its memory.

Legend: K changed elements of a tensor, here: of one place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from weightline.codec.coding import ordered_map
from weightline.codec.digest import add_digests, digest_change
from weightline.codec.torch_ops import signed_tensor
from weightline.errors import ApplyError, BaseMismatchError, DigestMismatchError
from weightline.serving.engines.vllm.elements import hold_elements, num_cpus, use_all_cpus, write_elements
from weightline.serving.engines.vllm.placement import Place, Placement
from weightline.types import BitsArray, Changes


@dataclass(frozen=True, slots=True, eq=False)
class StagedPlace:
    """What to write to one place: `new_K` at `at_K` of its flat memory, over `old_K`."""

    name: str
    flat: torch.Tensor
    at_K: torch.Tensor
    old_K: torch.Tensor
    new_K: torch.Tensor

    def write(self) -> bool:
        """Whether the memory then holds the new bits."""
        return write_elements(self.flat, self.at_K, self.new_K)

    def holds_old(self) -> bool:
        return hold_elements(self.flat, self.at_K, self.old_K)


@dataclass(frozen=True, slots=True, eq=False)
class Staged:
    """One worker's part of a set of changes. `digests`: by tensor, what writing the owned part adds to the state's."""

    places: tuple[StagedPlace, ...]
    digests: dict[str, int]
    num_elements: int

    def check_base(self) -> None:
        """BaseMismatchError, naming a tensor, unless every element here holds the old bits."""
        name = _first_false(self.places, StagedPlace.holds_old, torch.get_num_threads())
        if name is not None:
            raise BaseMismatchError(
                f"the engine's {name} does not hold the bits that the changes start from", tensor=name
            )

    def write(self) -> None:
        """Put the new bits in place and read them back. When it raises, any part may be written.

        DigestMismatchError, naming a tensor, when the memory does not hold what was written.
        """
        name = _first_false(self.places, StagedPlace.write, num_cpus())
        if name is not None:
            raise DigestMismatchError(f"{name} did not take the bits that were written", what=name)

    def turned_round(self) -> Staged:
        """What leads back; its digests are not kept."""
        places = (StagedPlace(one.name, one.flat, one.at_K, one.new_K, one.old_K) for one in self.places)
        return Staged(tuple(places), {}, self.num_elements)


def _first_false(places: Sequence[StagedPlace], check: Callable[[StagedPlace], bool], num_threads: int) -> str | None:
    """The tensor of a place for which the check does not hold. One thread a share: places are many and small."""

    def first_of(share: Sequence[StagedPlace]) -> str | None:
        use_all_cpus()
        return next((place.name for place in share if not check(place)), None)

    found = ordered_map(first_of, _shares(places, num_threads), num_threads)
    return next((name for name in found if name is not None), None)


def _shares(places: Sequence[StagedPlace], num_shares: int) -> list[list[StagedPlace]]:
    """The places in shares of about as many elements, the largest place first to the smallest share."""
    shares: list[list[StagedPlace]] = [[] for _ in range(num_shares)]
    sizes = [0] * num_shares
    for place in sorted(places, key=lambda place: place.at_K.numel(), reverse=True):
        smallest = sizes.index(min(sizes))
        shares[smallest].append(place)
        sizes[smallest] += place.at_K.numel()
    return shares


def stage(placement: Placement, owned: dict[str, list[int]], changes: Iterable[Changes]) -> Staged:
    """Find where the changed elements live here. Reads no weights and writes none. ApplyError for an unknown tensor."""
    places: list[StagedPlace] = []
    digests: dict[str, int] = {}
    num_elements = 0
    for one in changes:
        name = one.segment.tensor.name
        if name not in placement:
            raise ApplyError(f"the engine's parameters were not mapped for {name}: load the version", tensor=name)
        positions_K = torch.from_numpy(one.positions_K)
        for number, place in enumerate(placement[name]):
            found_K, at_K = place.locate(positions_K)
            if not at_K.numel():
                continue
            held = _part(one, found_K)
            places.append(_staged_place(place, at_K, held))
            if number in owned.get(name, ()):
                digests[name] = add_digests(digests.get(name, 0), digest_change(held))
                num_elements += held.num_changed
    return Staged(tuple(places), digests, num_elements)


def _part(changes: Changes, found_K: torch.Tensor) -> Changes:
    if bool(found_K.all()):
        return changes
    mask = found_K.numpy()
    return Changes(changes.segment, changes.positions_K[mask], changes.old_K[mask], changes.new_K[mask])


def _staged_place(place: Place, at_K: torch.Tensor, held: Changes) -> StagedPlace:
    device = place.flat.device
    columns = (_signed(bits_K).to(device) for bits_K in (held.old_K, held.new_K))
    return StagedPlace(held.segment.tensor.name, place.flat, at_K.to(device), *columns)


def _signed(bits_K: BitsArray) -> torch.Tensor:
    """A copy in memory of our own: what it is read from may go away."""
    return signed_tensor(bits_K.copy())
