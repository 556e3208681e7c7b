"""The settings of a publishing session, validated on creation. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from weightline.chain.upkeep.compact import AnchorPolicy
from weightline.codec.coding import codings
from weightline.dtypes import DtypeSetting
from weightline.errors import InputError

OnBacklog = Literal["wait", "fold"]
OnPublishError = Literal["stop", "skip_and_record"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishSettings:
    """Settings of one training process. Raises InputError for an invalid value."""

    stage: str = "train"
    """Label of every version: sft, dpo, grpo, ..."""
    run_id: str = "run"
    """Name of the run in every manifest."""
    sync_steps: int = 1
    """Optimizer steps between two versions."""
    coding: str = "gap-by-magnitude"
    """Coding of payloads: `gap-by-magnitude` (smallest) or `gap` (fastest)."""
    dtype: DtypeSetting = "auto"
    """Dtype of published weights: as training holds them (`held`), one by name, or the one of serving (`auto`)."""
    max_in_flight: int = 2
    """Syncs that may be captured and not settled. Bounds host memory."""
    on_backlog: OnBacklog = "wait"
    """Policy when the bucket is slower than training: `wait` for it, or `fold` the changes into the next sync."""
    on_publish_error: OnPublishError = "stop"
    """Policy when a version cannot be committed: `stop` training, or continue and let the next version span the gap."""
    anchor_policy: AnchorPolicy = field(default_factory=AnchorPolicy)
    """Decides when a full state is written beside a version, for replicas that join late."""
    timeout_seconds: float = 1800.0
    """Seconds that a rank waits in a collective for a rank that is alive and does not answer."""
    close_seconds: float = 60.0
    """Seconds that closing the session waits for the version that is being written."""
    provenance: dict[str, str] = field(default_factory=dict)
    """Links for people, copied into every manifest."""
    step_observer: str | None = None
    """`module:function` that makes the `StepObserver`. None: the value of WEIGHTLINE_STEP_OBSERVER, if set."""

    def __post_init__(self) -> None:
        for name in ("sync_steps", "max_in_flight"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: name 1 or more", field=name)
        for name in ("timeout_seconds", "close_seconds"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} is {getattr(self, name)}: name a time above 0", field=name)
        for name, known in (
            ("on_backlog", get_args(OnBacklog)),
            ("on_publish_error", get_args(OnPublishError)),
            ("coding", tuple(codings())),
            ("dtype", get_args(DtypeSetting)),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}: name one of {', '.join(known)}", field=name)
