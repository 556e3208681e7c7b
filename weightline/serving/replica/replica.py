"""A replica: one engine that follows one chain, and never serves a state whose digest was not checked.

`prepare` (fetch, verify, decode, prove) runs while the engine serves; `apply` is the pause. A failed write is undone,
or the version is loaded again from an anchor; until then the engine refuses requests.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from weightline.chain import Chain
from weightline.chain.files.assets import assets_of
from weightline.chain.files.meaning import meaning_of_asset
from weightline.chain.replay.state import check_digests
from weightline.errors import ApplyError, BaseMismatchError, InputError, WeightlineError
from weightline.format.keys import checked_name
from weightline.format.manifest import utc_now
from weightline.format.state_digests import StateDigests
from weightline.serving.engines.base import Engine
from weightline.serving.replica.prepare import (
    Held,
    Prepared,
    PreparedDelta,
    PreparedLoad,
    check_base,
    fits_in_place,
    prepare_delta,
    prepare_load,
    remove_leftovers,
)
from weightline.serving.replica.status import Mark, RefreshFacts, ReplicaStatus, error_text, read_mark, write_mark
from weightline.serving.replica.watch import VersionWatch


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """Settings of a replica. `drain_seconds`: the longest wait of a refresh for requests in flight. InputError."""

    drain_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not 0 <= self.drain_seconds <= 86400:
            raise InputError(
                f"a refresh cannot wait {self.drain_seconds:g} s for requests: name 0 to 86400", field="drain_seconds"
            )


@dataclass(frozen=True, slots=True)
class _ApplySeconds:
    """Where the time of an apply went: see `RefreshFacts`."""

    stage_seconds: float
    drain_seconds: float
    pause_seconds: float


class Replica:
    """One engine that follows one chain. Safe for threads; refreshes run one at a time. One process per `state_dir`."""

    def __init__(
        self, chain: Chain, engine: Engine, state_dir: Path, name: str, settings: ReplicaSettings = ReplicaSettings()
    ) -> None:
        self.chain, self.engine, self.state_dir, self.settings = chain, engine, state_dir, settings
        self.name = checked_name(name)
        self._refreshing = threading.Lock()
        self._held: Held | None = None
        self._last_error: WeightlineError | None = None
        self.watch = VersionWatch()
        state_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(state_dir)
        self._mark = self._own_mark()

    @property
    def version(self) -> int | None:
        """Returns the version that the engine serves now; None while it serves none."""
        return self.engine.version

    @property
    def returns_to(self) -> int | None:
        """Returns the version that `recover` would load. None without a mark, or once a version is held."""
        return None if self._held is not None or self._mark is None else self._mark.return_to

    def status(self) -> ReplicaStatus:
        """Returns the replica's state. Reads no bucket."""
        mark = self._mark
        is_serving = mark is not None and mark.status == "checked" and mark.version == self.version
        return ReplicaStatus(
            replica=self.name,
            chain=self.chain.url,
            engine=self.engine.name,
            state="serving" if is_serving else "loading" if self._refreshing.locked() else "waiting",
            version=mark.version if mark and is_serving else None,
            commit_id=mark.commit_id if mark and is_serving else None,
            served_at=mark.served_at if mark and is_serving else None,
            last_error=error_text(self._last_error) if self._last_error else None,
            **asdict(self.engine.abilities),
        )

    def recover(self) -> RefreshFacts | None:
        """Loads and checks the version that the mark names, after a start. None without a mark. Safe to repeat.

        A replica that was killed during an apply returns to the version before it.
        """
        if self._held is not None or self._mark is None or self._mark.return_to is None:
            return None
        return self.refresh(self._mark.return_to)

    def refresh(self, version: int | None = None, *, allow_backward: bool = False) -> RefreshFacts:
        """Moves to the version (None: the tip) and serves it. Safe to repeat: a replica that serves it does not move.

        It does not go back to an earlier version unless `allow_backward`, since requests may arrive out of order.
        ChainEmptyError, VersionNotFoundError, BaseMismatchError, UnsupportedFeatureError, CorruptError, StorageError
        and ApplyError leave it at its version. When the undo fails as well, it serves no version.
        """
        with self._refreshing, self._remembering_errors():
            started = time.perf_counter()
            wanted = self.chain.tip_header().version if version is None else self.chain.header(version).version
            held = self._held
            if held is not None and (wanted == held.version or (wanted < held.version and not allow_backward)):
                check_base(self.chain, held)
                return self._facts(held.version)
            prepared = self._prepare(wanted)
            prepare_seconds = time.perf_counter() - started
            applied = self._apply(prepared)
            return self._facts(
                held.version if held else None,
                prepare_seconds=prepare_seconds,
                **asdict(prepared.seconds),
                **asdict(applied),
                num_changed=prepared.num_changed,
                payload_nbytes=prepared.payload_nbytes,
            )

    def prepare(self, version: int) -> Prepared:
        """Does the work before the pause, for `apply`. The engine goes on serving and its weights are not written.

        An engine may keep only what was prepared last. Call `discard` of a result that is not applied.
        """
        with self._refreshing:
            return self._prepare(version)

    def apply(self, prepared: Prepared) -> float:
        """Does the pause and returns its seconds. BaseMismatchError when the engine moved since `prepared` was made.

        Any other error leaves the engine at its version. When the undo fails as well, it has no version.
        """
        with self._refreshing, self._remembering_errors():
            return self._apply(prepared).pause_seconds

    def _prepare(self, version: int) -> Prepared:
        held = self._held
        assets = {asset.name: asset for asset in assets_of(self.chain, version)}
        self.engine.require_assets(
            {name: asset.sha256 for name, asset in assets.items()},
            lambda name: meaning_of_asset(self.chain.store, assets[name]),
        )
        if held is None or not fits_in_place(self.chain, version, held):
            return prepare_load(self.chain, version, self.state_dir, held)
        return prepare_delta(self.chain, version, held, self.engine)

    def _apply(self, prepared: Prepared) -> _ApplySeconds:
        self._require_base(prepared)
        try:
            started = time.perf_counter()
            self._stage(prepared)
            staged = time.perf_counter()
            with self._paused():
                paused = time.perf_counter()
                self._move(prepared)
            return _ApplySeconds(staged - started, paused - staged, time.perf_counter() - paused)
        finally:
            prepared.discard()
            if self._held is None and prepared.held is not None:
                self._load_again(prepared.held)

    def _require_base(self, prepared: Prepared) -> None:
        is_kept = isinstance(prepared, PreparedLoad) or prepared.is_kept
        if prepared.held is not self._held or not is_kept:
            raise BaseMismatchError(
                f"version {prepared.header.version} was prepared for another state of the engine: prepare it again",
                version=prepared.header.version,
            )

    def _stage(self, prepared: Prepared) -> None:
        """Prepares the write before the pause. An engine that does not hold the base's bits stops serving."""
        if not isinstance(prepared, PreparedDelta):
            return
        try:
            self.engine.stage(prepared.changes)
        except BaseMismatchError:
            self._held = None
            self.engine.set_version(None)
            raise

    @contextmanager
    def _paused(self) -> Iterator[None]:
        self.engine.pause(self.settings.drain_seconds)
        try:
            yield
        finally:
            self.engine.resume()

    def _move(self, prepared: Prepared) -> None:
        """Withdraws the mark, writes, proves, marks; undoes the write after any error. For use in a pause."""
        served_at = self._mark.served_at if self._mark else None
        self._withdraw(prepared)
        is_done = False
        try:
            self._hold(self._write(prepared), utc_now())
            is_done = True
        finally:
            if not is_done:
                self._held = None
                self.engine.set_version(None)
                if isinstance(prepared, PreparedDelta):
                    self.engine.undo_staged()
                    self._hold(prepared.held, served_at)

    def _write(self, prepared: Prepared) -> Held:
        header = prepared.header
        if isinstance(prepared, PreparedLoad):
            self.engine.load(prepared.folder)
            return Held(header.version, header.commit_id, prove_weights(self.engine, self.chain, header.version))
        self.engine.write_staged()
        return Held(header.version, header.commit_id, prepared.digests)

    def _load_again(self, lost: Held) -> None:
        """Loads the previous version into a torn engine again, from the chain. ApplyError when that fails as well."""
        try:
            prepared = prepare_load(self.chain, lost.version, self.state_dir)
            try:
                with self._paused():
                    self._move(prepared)
            finally:
                prepared.discard()
        except WeightlineError as error:
            raise ApplyError(
                f"the replica could neither move nor return to version {lost.version}, and serves no version: {error}",
                version=lost.version, engine=self.engine.name,
            ) from error  # fmt: skip

    def _withdraw(self, prepared: Prepared) -> None:
        held = prepared.held
        self._put_mark("moving", held, moving_to=prepared.header.version)
        self.engine.set_version(None)

    def _hold(self, held: Held, served_at: str | None) -> None:
        self._held = held
        self.engine.set_version(held.version)
        self._put_mark("checked", held, served_at=served_at)
        self.watch.announce()

    def _put_mark(
        self,
        status: Literal["checked", "moving"],
        held: Held | None,
        *,
        served_at: str | None = None,
        moving_to: int | None = None,
    ) -> None:
        mark = Mark(
            status=status,
            chain=self.chain.url,
            replica=self.name,
            version=held.version if held else None,
            commit_id=held.commit_id if held else None,
            served_at=served_at,
            moving_to=moving_to,
        )
        write_mark(self.state_dir, mark)
        self._mark = mark

    def _own_mark(self) -> Mark | None:
        mark = read_mark(self.state_dir)
        if mark is not None and mark.chain != self.chain.url:
            raise InputError(
                f"{self.state_dir} belongs to a replica of {mark.chain}, not of {self.chain.url}: name another folder",
                state_dir=str(self.state_dir), chain=self.chain.url,
            )  # fmt: skip
        return mark

    def _facts(self, from_version: int | None, **measured: float) -> RefreshFacts:
        held, mark = self._held, self._mark
        assert held is not None
        assert mark is not None
        counts = ("pause_seconds", "drain_seconds", "prepare_seconds", "num_changed", "payload_nbytes")
        fields = {"version": held.version, "commit_id": held.commit_id, "from_version": from_version}
        identity = {"replica": self.name, "served_at": mark.served_at}
        return RefreshFacts.model_validate(dict.fromkeys(counts, 0) | fields | identity | measured)

    @contextmanager
    def _remembering_errors(self) -> Iterator[None]:
        try:
            yield
        except WeightlineError as error:
            self._last_error = error
            raise
        except Exception as error:
            # An engine is third-party code: its errors of any type become ApplyError here, and only here.
            self._last_error = ApplyError(f"{self.engine.name} failed: {error!r}", engine=self.engine.name)
            raise self._last_error from error
        self._last_error = None


def prove_weights(engine: Engine, chain: Chain, version: int) -> StateDigests:
    """Compares the digests of the engine's memory with the version's; returns them. Time grows with the model.

    ApplyError when the engine does not hold the version's tensors as they are; DigestMismatchError when bits differ.
    """
    specs, layout = engine.specs(), chain.layout(version)
    for spec in layout.specs:
        if specs.get(spec.name) != spec:
            raise ApplyError(
                f"{engine.name} holds {specs.get(spec.name)} where version {version} has {spec}: an engine that "
                "renames, casts or fuses the model's tensors cannot be refreshed in place",
                version=version, engine=engine.name, tensor=spec.name,
            )  # fmt: skip
    digests = StateDigests.of(layout, engine.read_digests())
    check_digests(digests, chain, version)
    return digests
