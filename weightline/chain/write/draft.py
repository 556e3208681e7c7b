"""Drafts: collect the payloads of a version or shortcut, and build its manifest. All writers use them.

A writer encodes payloads, uploads each under the key that the draft assigns, adds it to the draft, and finally builds
the manifest or the shortcut from the draft. Ranks of a trainer upload their own payloads; rank 0 has the draft.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from weightline.chain.write.commit import new_commit_id
from weightline.chain.write.version import NewVersion
from weightline.codec.anchor import ANCHOR_CODING
from weightline.errors import InputError
from weightline.format import keys
from weightline.format.documents import MAX_LABEL_LENGTH, MAX_NOTE_LENGTH, require_text
from weightline.format.manifest import (
    AdapterBase,
    AssetRef,
    Header,
    Manifest,
    Origin,
    PayloadRef,
    utc_now,
)
from weightline.format.shortcut import Shortcut
from weightline.format.state_digests import StateDigests
from weightline.format.tensor_layout import Layout
from weightline.store import Store
from weightline.store.open import is_remote
from weightline.types import TensorSpec

#: Files that wait on disk or are being uploaded, besides the one that is being written.
_NUM_AHEAD = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Authorship:
    """The facts of a version that its writer has before any payload is written."""

    stage: str
    run_id: str
    global_step: int
    kind: Literal["anchor", "delta", "revert"]
    coding: str
    """The coding of deltas. An anchor always has ANCHOR_CODING."""
    reverts_to: int | None = None
    forked_from: Origin | None = None
    base_model: AdapterBase | None = None
    is_milestone: bool
    assets: tuple[AssetRef, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises InputError, before anything is written, for a text that no manifest can hold."""
        for name in ("stage", "run_id", "coding"):
            require_text(name, getattr(self, name), MAX_LABEL_LENGTH)
        for name in (*self.metrics, *self.provenance):
            require_text(f"the name {name[:50]!r}", name, MAX_LABEL_LENGTH)
        for name, text in self.provenance.items():
            require_text(f"provenance.{name}", text, MAX_NOTE_LENGTH)


@dataclass(slots=True)
class Draft:
    """The payloads of one attempt to write a version or a shortcut. Until a manifest names them they are orphans."""

    version: int
    attempt_id: str = field(default_factory=new_commit_id)
    """Part of the payloads' keys, so that no two attempts share a key. It becomes the commit_id of a version."""
    payloads: list[PayloadRef] = field(default_factory=list)
    num_changed: int = 0

    def key(self, rank: int) -> str:
        """Returns the key of the rank's payload."""
        return keys.payload(self.version, self.attempt_id, rank)

    def add(self, rank: int, nbytes: int, sha256: str, num_changed: int = 0) -> None:
        """Adds a payload that is uploaded, or whose upload has started."""
        self.payloads.append(PayloadRef(key=self.key(rank), nbytes=nbytes, sha256=sha256, rank=rank))
        self.num_changed += num_changed

    def manifest(
        self, author: Authorship, specs: Mapping[str, TensorSpec], digests: Mapping[str, int], *, world_size: int
    ) -> Manifest:
        """Returns the manifest of the version, once its payloads are up. `digests` of its whole state, by tensor.

        InputError for facts that contradict each other, and for those that no reader would accept.
        """
        state = StateDigests.of(Layout.of(specs.values()), digests)
        with self._naming_fields():
            return self.new_version(author, state, world_size=world_size).manifest()

    def new_version(self, author: Authorship, digests: StateDigests, *, world_size: int) -> NewVersion:
        """Returns the version, once its payloads are up. `digests` of its whole state. Raises as `manifest` does."""
        with self._naming_fields():
            facts = self._facts(author, digests.layout, world_size)
        return NewVersion(facts, digests, author.assets, author.provenance)

    @contextmanager
    def _naming_fields(self) -> Iterator[None]:
        try:
            yield
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(str(part) for part in first["loc"]) or "manifest"
            message = f"version {self.version} cannot be committed: {name}: {first['msg']}"
            raise InputError(message, field=name) from error

    def _facts(self, author: Authorship, layout: Layout, world_size: int) -> Header:
        is_anchor = author.kind == "anchor"
        return Header(
            format="",
            version=self.version,
            base_version=None if is_anchor else self.version - 1,
            kind=author.kind,
            reverts_to=author.reverts_to,
            forked_from=author.forked_from,
            base_model=author.base_model,
            commit_id=self.attempt_id,
            created_at=utc_now(),
            run_id=author.run_id,
            stage=author.stage,
            global_step=author.global_step,
            is_milestone=author.is_milestone,
            coding=ANCHOR_CODING if is_anchor else author.coding,
            world_size=world_size,
            num_changed=layout.num_elements if is_anchor else self.num_changed,
            num_elements=layout.num_elements,
            payload_nbytes=self._payload_nbytes,
            full_nbytes=layout.nbytes,
            payloads=tuple(self.payloads),
            metrics=author.metrics,
        )

    def shortcut(self, version: Header, base: Header | None, coding: str) -> Shortcut:
        """Builds the shortcut to a committed version, once all payloads are added. Without `base` it is an anchor."""
        return Shortcut(
            version=version.version,
            base_version=None if base is None else base.version,
            commit_id=version.commit_id,
            base_commit_id=None if base is None else base.commit_id,
            created_at=utc_now(),
            coding=ANCHOR_CODING if base is None else coding,
            num_changed=version.num_elements if base is None else self.num_changed,
            payload_nbytes=self._payload_nbytes,
            payloads=tuple(self.payloads),
        )

    @property
    def _payload_nbytes(self) -> int:
        return sum(payload.nbytes for payload in self.payloads)


class Uploads:
    """Uploads files in threads and removes them from disk afterwards. To be used from one thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pending: deque[Future[None]] = deque()
        self._threads = ThreadPoolExecutor(_NUM_AHEAD, thread_name_prefix="weightline-upload")

    def start(self, key: str, path: Path) -> None:
        """Starts the upload of a finished file. Waits while `_NUM_AHEAD` are pending; raises errors of earlier ones."""
        if not is_remote(self._store):
            self._upload(key, path)
            return
        while len(self._pending) >= _NUM_AHEAD:
            self._pending.popleft().result()
        self._pending.append(self._threads.submit(self._upload, key, path))

    def finish(self) -> None:
        """Waits until all files are durable in the bucket. Raises the first error."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Cancels the uploads that have not begun."""
        self._threads.shutdown(cancel_futures=True)

    def _upload(self, key: str, path: Path) -> None:
        self._store.put_file(key, path)
        path.unlink()


def require_elements(specs: Iterable[TensorSpec], what: str) -> None:
    """InputError for a state without a single element, as ZeRO-3 leaves where nothing was gathered."""
    if not any(spec.num_elements for spec in specs):
        raise InputError(
            f"{what} has no tensor with an element, so there is nothing to publish. Under ZeRO-3, gather the weights "
            "before they are saved (stage3_gather_16bit_weights_on_model_save), and publish what training holds"
        )


@contextmanager
def uploading(store: Store) -> Iterator[Uploads]:
    """Provides `Uploads`. When the block ends without an error, all started files are in the bucket.

    After an error there may be orphans, which gc removes.
    """
    uploads = Uploads(store)
    try:
        yield uploads
        uploads.finish()
    finally:
        uploads.close()
