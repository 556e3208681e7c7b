"""Long and wide chains for benchmarks, a store that counts what it is asked, and an engine that only holds bits.

A chain of ten thousand versions is made in half a minute: its manifests are put together from parts that do not change
and written without fsync. Every version is sound: its payload is real, and its digests are those of its state.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from weightline.chain.files.source import FolderSource
from weightline.chain.read.history import Chain
from weightline.chain.write.commit import new_commit_id
from weightline.codec.anchor import ANCHOR_CODING
from weightline.codec.capture import capture
from weightline.codec.digest import add_digests, digest_change, format_digest, tensor_digest
from weightline.format import keys
from weightline.format.manifest import AssetRef, Manifest, PayloadRef, TensorState, utc_now
from weightline.format.write_payload import PayloadInfo, write_anchor, write_delta
from weightline.serving.engines.base import Abilities, InProcessEngine
from weightline.store import ObjectInfo, Store
from weightline.store.base import MAX_GET_NBYTES
from weightline.store.local import LocalStore
from weightline.testing.faults import FaultStore
from weightline.types import BitsArray, Changes, PositionArray, TensorSpec, whole

#: Elements of a tensor. Everything but the payloads is the same for tensors of any size.
_NUM_ELEMENTS = 16
#: Keys that one request of a listing returns.
_PAGE = 1000


def tensor_names(num_tensors: int) -> list[str]:
    """Returns names as a mixture of experts has them."""
    return [
        f"model.layers.{n // 384}.mlp.experts.{n // 3 % 128}.{'gud'[n % 3]}_proj.weight" for n in range(num_tensors)
    ]


@dataclass(slots=True)
class ChainMaker:
    """Appends versions to a chain in a folder: an anchor, then deltas of a few tensors, one element each."""

    root: Path
    num_tensors: int
    num_changed: int = 4
    version: int = -1
    payload_nbytes: int = 0
    """Of the newest version."""
    _specs: list[TensorSpec] = field(default_factory=list)
    _bits: list[BitsArray] = field(default_factory=list)
    _digests: list[int] = field(default_factory=list)
    _texts: list[str] = field(default_factory=list)
    _facts: dict[str, object] = field(default_factory=dict)

    def grow(self, num_versions: int) -> None:
        """Appends so many versions."""
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(num_versions):
                self._append(Path(folder) / "payload")
        write(self.root / keys.TIP_HINT, json.dumps({"version": self.version}).encode())

    def _append(self, path: Path) -> None:
        self.version += 1
        info = self._first(path) if self.version == 0 else self._next(path)
        commit_id = new_commit_id()
        key = keys.payload(self.version, commit_id, 0)
        write(self.root / key, path.read_bytes())
        self.payload_nbytes = info.nbytes
        payload = PayloadRef(key=key, nbytes=info.nbytes, sha256=info.sha256, rank=0)
        if self.version == 0:
            self._facts = self._facts_of_first(commit_id, payload)
        elif self.version == 1:
            self._facts |= {"base_version": 0, "kind": "delta", "coding": "gap", "assets": []}
        facts = self._facts | {
            "version": self.version, "commit_id": commit_id, "payloads": [payload.model_dump()],
            "payload_nbytes": info.nbytes, "num_changed": info.num_changed, "global_step": self.version,
            "base_version": self.version - 1 if self.version else None, "created_at": utc_now(),
        }  # fmt: skip
        head = json.dumps(facts, separators=(",", ":"))
        write(self.root / keys.commit(self.version), f'{head[:-1]},"tensors":{{{",".join(self._texts)}}}}}'.encode())

    def _first(self, path: Path) -> PayloadInfo:
        rng = np.random.default_rng(0)
        self._specs = [TensorSpec(name, "BF16", (_NUM_ELEMENTS,)) for name in tensor_names(self.num_tensors)]
        self._bits = list(rng.integers(0, 1 << 15, (self.num_tensors, _NUM_ELEMENTS), np.uint16))
        parts = [(whole(spec), bits_N) for spec, bits_N in zip(self._specs, self._bits, strict=True)]
        self._digests = [tensor_digest(*part) for part in parts]
        self._texts = [self._text(n) for n in range(self.num_tensors)]
        return write_anchor(path, parts)

    def _next(self, path: Path) -> PayloadInfo:
        rng = np.random.default_rng(self.version)
        changes = []
        for n in sorted(rng.choice(self.num_tensors, min(self.num_changed, self.num_tensors), replace=False).tolist()):
            new_N = self._bits[n].copy()
            new_N[rng.integers(_NUM_ELEMENTS)] ^= 1
            found = capture(whole(self._specs[n]), self._bits[n], new_N)
            self._bits[n], self._digests[n] = new_N, add_digests(self._digests[n], digest_change(found))
            self._texts[n] = self._text(n)
            changes.append(found)
        return write_delta(path, changes, "gap")

    def _text(self, n: int) -> str:
        spec = self._specs[n]
        state = {"dtype": spec.dtype, "shape": list(spec.shape), "digest": format_digest(self._digests[n])}
        return f"{json.dumps(spec.name)}:{json.dumps(state, separators=(',', ':'))}"

    def _facts_of_first(self, commit_id: str, payload: PayloadRef) -> dict[str, object]:
        """Returns all of the first manifest but its tensors."""
        config = b'{"model_type": "toy"}'
        asset = AssetRef.model_validate(_asset(self.root, config))
        num_elements = self.num_tensors * _NUM_ELEMENTS
        states = {
            spec.name: TensorState(dtype=spec.dtype, shape=spec.shape, digest=format_digest(digest))
            for spec, digest in zip(self._specs, self._digests, strict=True)
        }
        first = Manifest(
            version=0, base_version=None, kind="anchor", commit_id=commit_id, created_at=utc_now(), run_id="bench",
            stage="grpo", global_step=0, coding=ANCHOR_CODING, world_size=1, num_changed=num_elements,
            num_elements=num_elements, payload_nbytes=payload.nbytes, full_nbytes=2 * num_elements,
            payloads=(payload,), assets=(asset,), tensors=states,
        )  # fmt: skip
        return first.model_dump(mode="json", exclude={"tensors"})


def _asset(root: Path, body: bytes) -> dict[str, object]:
    sha256 = hashlib.sha256(body).hexdigest()
    write(root / keys.asset(sha256), body)
    return {"key": keys.asset(sha256), "nbytes": len(body), "sha256": sha256, "name": "config.json"}


def write(path: Path, body: bytes) -> None:
    """Writes a file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)


class MeteredStore(FaultStore):
    """A bucket that counts requests, as an object store would be asked, and the bytes that it returns."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner, self._count)
        self.requests: Counter[str] = Counter()
        self.read_nbytes: Counter[str] = Counter()
        """By the first part of the key."""

    @property
    def num_requests(self) -> int:
        return sum(self.requests.values())

    def reset(self) -> None:
        self.requests.clear()
        self.read_nbytes.clear()

    def get(self, key: str, max_nbytes: int = MAX_GET_NBYTES) -> bytes:
        body = super().get(key, max_nbytes)
        self.read_nbytes[key.partition("/")[0]] += len(body)
        return body

    def get_file(self, key: str, path: Path, nbytes: int | None = None) -> None:
        super().get_file(key, path, nbytes)
        self.read_nbytes[key.partition("/")[0]] += path.stat().st_size

    def list(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
        """A listing is a request for each thousand keys that its caller takes."""
        for number, info in enumerate(super().list(prefix, start_after)):
            if number and number % _PAGE == 0:
                self.requests["list"] += 1
            yield info

    def delete(self, *doomed: str) -> None:
        self.requests["delete"] += -(-len(doomed) // _PAGE)
        self.inner.delete(*doomed)

    def _count(self, _number: int, verb: str, key: str) -> None:
        self.requests[verb] += 1


def metered(root: Path) -> tuple[Chain, MeteredStore]:
    """Opens a chain in a folder anew, with a store that counts."""
    store = MeteredStore(LocalStore(root))
    return Chain(store), store


class BitsEngine(InProcessEngine):
    """Holds a version's bits and answers nothing."""

    name = "bits"
    abilities = Abilities()

    def __init__(self) -> None:
        self.version: int | None = None
        self._bits: dict[str, BitsArray] = {}
        self._specs: dict[str, TensorSpec] = {}

    def require_assets(self, sha256_of: Mapping[str, str], meaning_of: Callable[[str], str]) -> None:
        return

    def load(self, folder: Path) -> None:
        source = FolderSource(folder)
        self._specs = source.specs
        self._bits = source.read(self._specs)

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read_bits(self, name: str) -> BitsArray:
        return self._bits[name]

    def read_elements(self, name: str, positions_K: PositionArray) -> BitsArray:
        return self._bits[name][positions_K]

    def scatter(self, changes: Sequence[Changes]) -> None:
        for one in changes:
            self._bits[one.segment.tensor.name][one.positions_K] = one.new_K

    def set_version(self, version: int | None) -> None:
        self.version = version

    def pause(self, timeout_seconds: float) -> None:
        return

    def resume(self) -> None:
        return

    def generate(self, request: object) -> None:
        raise NotImplementedError


def resident_nbytes() -> int:
    """Returns the memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
