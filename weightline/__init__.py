"""Post-training in which every weight update is a commit.

The names below are the public interface (docs/stability.md). Each is imported at its first use, so `import weightline`
itself imports only the standard library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weightline.chain.files.checkpoint import write_checkpoint
    from weightline.chain.read.history import Chain, open_chain
    from weightline.chain.read.refs import move_ref, resolve
    from weightline.chain.replay.diff import diff_versions
    from weightline.chain.replay.state import read_state
    from weightline.chain.upkeep.verify import verify_chain
    from weightline.chain.write.standalone import commit_folder, commit_fork, commit_revert
    from weightline.errors import (
        ApplyError,
        ConflictError,
        CorruptError,
        InputError,
        NotFoundError,
        PublishError,
        StorageError,
        WeightlineError,
    )
    from weightline.format.manifest import Manifest
    from weightline.serving.replica.replica import Replica
    from weightline.stages.chain_rollouts import ChainRollouts
    from weightline.store.open import open_store
    from weightline.trainer.callback import WeightlineCallback
    from weightline.trainer.settings import PublishSettings

__version__ = "0.1.0"

__all__ = [
    "ApplyError",
    "Chain",
    "ChainRollouts",
    "ConflictError",
    "CorruptError",
    "InputError",
    "Manifest",
    "NotFoundError",
    "PublishError",
    "PublishSettings",
    "Replica",
    "StorageError",
    "WeightlineCallback",
    "WeightlineError",
    "__version__",
    "commit_folder",
    "commit_fork",
    "commit_revert",
    "diff_versions",
    "move_ref",
    "open_chain",
    "open_store",
    "read_state",
    "resolve",
    "verify_chain",
    "write_checkpoint",
]

_HOMES = {
    "weightline.chain.files.checkpoint": ("write_checkpoint",),
    "weightline.chain.read.history": ("Chain", "open_chain"),
    "weightline.chain.read.refs": ("move_ref", "resolve"),
    "weightline.chain.replay.diff": ("diff_versions",),
    "weightline.chain.replay.state": ("read_state",),
    "weightline.chain.upkeep.verify": ("verify_chain",),
    "weightline.chain.write.standalone": ("commit_folder", "commit_fork", "commit_revert"),
    "weightline.errors": (
        *("ApplyError", "ConflictError", "CorruptError", "InputError", "NotFoundError"),
        *("PublishError", "StorageError", "WeightlineError"),
    ),
    "weightline.format.manifest": ("Manifest",),
    "weightline.serving.replica.replica": ("Replica",),
    "weightline.stages.chain_rollouts": ("ChainRollouts",),
    "weightline.store.open": ("open_store",),
    "weightline.trainer.callback": ("WeightlineCallback",),
    "weightline.trainer.settings": ("PublishSettings",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

# Hidden from type checkers, which would otherwise accept any name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Imports a public name from where it is defined. MissingExtraError when an extra that it needs is missing."""
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(_HOME_OF[name]), name)
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
