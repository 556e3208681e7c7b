"""Proof that an engine's weights are a version's bits: read from the engine, compared with manifest or changes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from weightline.codec.changes import whole
from weightline.codec.digest import tensor_digest
from weightline.errors import ApplyError, DigestMismatchError
from weightline.format.manifest import Manifest
from weightline.serving.engines.base import Engine, StagingEngine
from weightline.serving.replica.pending import check_digests
from weightline.types import Changes


def prove_weights(engine: Engine, manifest: Manifest) -> dict[str, int]:
    """Read every tensor and compare its digest with the manifest's; return the digests. Time grows with the model.

    ApplyError when the engine does not hold the manifest's tensors as they are; DigestMismatchError when bits differ.
    """
    held = engine.specs()
    for name, spec in manifest.specs.items():
        if held.get(name) != spec:
            raise ApplyError(
                f"{engine.name} holds {held.get(name)} where version {manifest.version} has {spec}: an engine that "
                "renames, casts or fuses the model's tensors cannot be refreshed in place",
                version=manifest.version, engine=engine.name, tensor=name,
            )  # fmt: skip
    if isinstance(engine, StagingEngine):
        digests = engine.read_digests()
    else:
        digests = {name: tensor_digest(whole(spec), engine.read_bits(name)) for name, spec in manifest.specs.items()}
    check_digests(digests, manifest)
    return digests


def prove_elements(engine: Engine, changes: Iterable[Changes], version: int) -> None:
    """Read the changed elements back. Time and memory with the number of changes. DigestMismatchError when any differs.

    With the digest that the changes lead to (proven before they are written), this is the proof of the whole state. A
    StagingEngine has done it in `scatter`.
    """
    if isinstance(engine, StagingEngine):
        return
    for one in changes:
        name = one.segment.tensor.name
        if not np.array_equal(engine.read_elements(name, one.positions_K), one.new_K):
            raise DigestMismatchError(f"{name} did not take the bits of version {version}", what=name, version=version)
