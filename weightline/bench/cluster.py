"""Estimates the costs of publishing and following for any model and cluster. A model, not a measurement.

Bytes: positions of a random set of density d cost H(d)/d bits per changed element, a step about 1.3 bits (measured: 87
to 91 % of steps are +1 or -1); each coding reaches a factor of that sum. Time: the work of a rank divided by a rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from weightline.errors import InputError

#: Bits of a step (sign and size), from the change statistics of real SFT and GRPO runs.
STEP_BITS = 1.3
#: Measured bytes over that sum, by coding, on consecutive bf16 states of trained models.
CODING_FACTORS = {"gap": 1.08, "gap-by-magnitude": 0.76}
#: Range of valid numbers. Beyond it a product may exceed the range of floats.
_SMALLEST, _LARGEST = 1e-9, 1e18


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A training cluster and its readers. Rates are those of one rank or one reader."""

    num_params: float
    num_ranks: int
    density: float
    """Changed elements over all elements, per sync."""
    itemsize: int = 2
    coding: str = "gap-by-magnitude"
    uplink_gbps: float = 25.0
    """Network from one rank to the bucket, in gigabits per second."""
    downlink_gbps: float = 25.0
    """Network from the bucket to one reader, in gigabits per second."""
    num_reader_ranks: int = 8
    """Tensor-parallel ranks of one replica, each fetching and applying its part."""
    capture_elements_per_second: float = 1.5e9
    """Compared elements per second and rank (one CPU core; a GPU is much faster)."""
    encode_elements_per_second: float = 40e6
    """Coded changed elements per second and rank."""
    decode_elements_per_second: float = 10e6
    """Decoded changed elements per second and reader rank."""
    apply_elements_per_second: float = 50e6
    """Scattered changed elements per second and reader rank, which determine the pause."""
    commit_seconds: float = 0.3
    """Time for gathering the ranks' facts, and for the create-only put."""

    def __post_init__(self) -> None:
        """Raises InputError, which names the field, for an invalid value."""
        if self.coding not in CODING_FACTORS:
            raise InputError(f"coding is {self.coding!r}: give one of {', '.join(CODING_FACTORS)}", field="coding")
        for name, value in ((one.name, getattr(self, one.name)) for one in fields(self) if one.name != "coding"):
            if not (_SMALLEST <= value <= _LARGEST or (name == "commit_seconds" and value == 0)):
                raise InputError(f"{name} is {value}: give a number from {_SMALLEST:g} to {_LARGEST:g}", field=name)
        if self.density > 1:
            raise InputError(f"density is {self.density}: give a share above 0 and up to 1", field="density")


@dataclass(frozen=True, slots=True)
class ClusterCost:
    """The costs of a cluster, per sync unless the name says otherwise."""

    full_nbytes: float
    baseline_nbytes_per_rank: float
    bytes_per_changed: float
    delta_nbytes: float
    delta_nbytes_per_rank: float
    ratio_to_full: float
    capture_seconds: float
    """Time by which training is delayed."""
    encode_seconds: float
    upload_seconds: float
    publish_seconds: float
    """Time from capture to the committed version."""
    full_upload_seconds: float
    download_seconds: float
    decode_seconds: float
    pause_seconds: float
    refresh_seconds: float
    """Time from the committed version to serving it."""


def bytes_per_changed(density: float, coding: str) -> float:
    """Returns the expected payload bytes of one changed element."""
    entropy_bits = -density * math.log2(density) - (1 - density) * math.log2(1 - density) if density < 1 else 0.0
    return CODING_FACTORS[coding] * (entropy_bits / density + STEP_BITS) / 8


def plan_cluster(cluster: Cluster) -> ClusterCost:
    """Returns the costs. Pure."""
    changed = cluster.num_params * cluster.density
    changed_per_rank = changed / cluster.num_ranks
    full_nbytes = cluster.num_params * cluster.itemsize
    per_changed = bytes_per_changed(cluster.density, cluster.coding)
    delta_nbytes = changed * per_changed
    uplink, downlink = (gbps * 1e9 / 8 for gbps in (cluster.uplink_gbps, cluster.downlink_gbps))
    capture = cluster.num_params / cluster.num_ranks / cluster.capture_elements_per_second
    encode = changed_per_rank / cluster.encode_elements_per_second
    upload = delta_nbytes / cluster.num_ranks / uplink
    download = delta_nbytes / cluster.num_reader_ranks / downlink
    changed_per_reader = changed / cluster.num_reader_ranks
    decode = changed_per_reader / cluster.decode_elements_per_second
    pause = changed_per_reader / cluster.apply_elements_per_second
    return ClusterCost(
        full_nbytes=full_nbytes,
        baseline_nbytes_per_rank=full_nbytes / cluster.num_ranks,
        bytes_per_changed=per_changed,
        delta_nbytes=delta_nbytes,
        delta_nbytes_per_rank=delta_nbytes / cluster.num_ranks,
        ratio_to_full=delta_nbytes / full_nbytes,
        capture_seconds=capture,
        encode_seconds=encode,
        upload_seconds=upload,
        publish_seconds=capture + encode + upload + cluster.commit_seconds,
        full_upload_seconds=full_nbytes / cluster.num_ranks / uplink,
        download_seconds=download,
        decode_seconds=decode,
        pause_seconds=pause,
        refresh_seconds=download + decode + pause,
    )
