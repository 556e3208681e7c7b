"""Chooses the small files of a checkpoint folder: what a loader may read beside the weights, with their paths.

Everything belongs to a version but weights, states and logs of a training, data, pictures and hidden files. A folder
below that is a checkpoint of its own belongs to none. What is left out has a name and a reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from weightline.chain.files.other_formats import CONVERTIBLE_WEIGHTS, TRAINING_STATE
from weightline.chain.files.weight_files import is_file_there
from weightline.errors import InputError
from weightline.format import keys

#: A larger file is left out.
MAX_ASSET_NBYTES = 64 * 1024 * 1024

#: A checkpoint folder has a few dozen small files.
MAX_FOLDER_ASSETS = 1000

_MAX_DEPTH = 8

#: The version's mark and the index of a checkpoint's shards: a pulled folder has its own.
_OWN = (keys.VERSION_MARK, "*.safetensors.index.json")

#: What a file is -> patterns of its name. The first kind with a pattern that fits counts.
_FOREIGN: Mapping[str, tuple[str, ...]] = {
    "hidden": (".*",),
    "an index of other weights": ("*.bin.index.json",),
    "of a training": (*TRAINING_STATE, "trainer_state.json", "*_results.json", "zero_to_fp32.py", "latest"),
    "a log": ("events.out.*", "*.log", "*.out", "*.err"),
    "weights of another format": (*CONVERTIBLE_WEIGHTS, "*.gguf", "*.ot", "*.onnx*", "*.tflite", "*.distcp"),
    "a pickle": ("*.pkl", "*.pickle"),
    "compiled code": ("*.pyc",),
    "data": ("*.jsonl", "*.csv", "*.parquet", "*.arrow", "*.db"),
    "an archive": ("*.zip", "*.tar", "*.gz"),
    "a picture": ("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.pdf", "*.mp4"),
    "a notebook": ("*.ipynb",),
    "a key": ("*.pem", "*.key"),
    "a lock": ("*.lock",),
    "a temporary file": ("*.tmp",),
}

#: The same for folders.
_FOREIGN_FOLDERS: Mapping[str, tuple[str, ...]] = {
    "hidden": (".*",),
    "a checkpoint of its own": ("checkpoint-*", "tmp-checkpoint-*"),
    "of a training": ("global_step*", "pytorch_model_fsdp*", "optimizer*"),
    "logs": ("runs", "logs", "wandb"),
    "compiled code": ("__pycache__",),
}


@dataclass(frozen=True, slots=True)
class SmallFiles:
    """The small files of a folder, as paths below it in the spelling of manifests."""

    taken: tuple[str, ...]
    left_out: tuple[str, ...]
    """Paths of files and folders that belong to no version, each with the reason in brackets."""


def find_small_files(folder: Path, *, weights: frozenset[str] = frozenset(), is_saved: bool = False) -> SmallFiles:
    """Returns the small files of a checkpoint folder. Reads names and sizes only.

    Args:
        folder: The checkpoint folder. Links to files are followed, as the Hub's cache has them; links to folders are
            not.
        weights: Names of the files whose tensors the version holds.
        is_saved: The libraries' save methods have just written the folder, so that every file in it belongs to the
            model, whatever its name.

    Raises:
        InputError: A link without a target, or more files than a checkpoint has.
    """
    taken: list[str] = []
    left_out: list[str] = []
    for name, reason in _entries(folder, "", weights, is_saved):
        if reason is None:
            taken.append(name)
        else:
            left_out.append(f"{name} ({reason})")
        if len(taken) > MAX_FOLDER_ASSETS:
            raise InputError(
                f"{folder} holds more than {MAX_FOLDER_ASSETS} small files beside the weights: name a folder that "
                "holds the model alone",
                path=str(folder),
            )
    return SmallFiles(tuple(taken), tuple(left_out))


def foreign_patterns() -> list[str]:
    """Returns patterns of paths, as the Hub's client takes them, of what is never a small file nor safetensors.

    `*` stands for slashes as well.
    """
    names = [pattern for of_kind in _FOREIGN.values() for pattern in of_kind]
    names += [f"{pattern}/*" for of_kind in _FOREIGN_FOLDERS.values() for pattern in of_kind]
    return [path for name in names for path in (name, f"*/{name}")]


def _entries(folder: Path, below: str, weights: frozenset[str], is_saved: bool) -> Iterator[tuple[str, str | None]]:
    """Yields every file, and every folder that is left out as a whole, with the reason to leave it out."""
    for path in sorted((folder / below).iterdir()):
        name = f"{below}{path.name}"
        if name in weights or (not below and _matches(path.name, _OWN)):
            continue
        if not path.is_dir():
            yield name, None if is_saved else _reason_of_file(path, name)
        elif reason := _reason_of_folder(path, name):
            yield f"{name}/", reason
        else:
            yield from _entries(folder, f"{name}/", weights, is_saved)


def _reason_of_file(path: Path, name: str) -> str | None:
    """Returns why a file is left out; None when it belongs to the model. InputError for a link without a target."""
    foreign = _described(path.name, _FOREIGN)
    if foreign is not None:
        return foreign
    if "/" not in name and path.suffix == ".safetensors":
        return "weights that the index does not name"
    if not is_file_there(path):
        return "not a file"
    if path.stat().st_size > MAX_ASSET_NBYTES:
        return f"larger than {MAX_ASSET_NBYTES >> 20} MiB"
    try:
        keys.checked_path(name)
    except InputError:
        return "a name that no version can have"
    return None


def _reason_of_folder(path: Path, name: str) -> str | None:
    foreign = _described(path.name, _FOREIGN_FOLDERS)
    if foreign is not None:
        return foreign
    if path.is_symlink():
        return "a link to a folder"
    if len(PurePosixPath(name).parts) > _MAX_DEPTH:
        return "too deep"
    if (path / "trainer_state.json").exists() or (path / "adapter_config.json").exists():
        return "a checkpoint of its own"
    return None


def _described(name: str, patterns: Mapping[str, tuple[str, ...]]) -> str | None:
    """Returns what the first pattern that fits says of the name."""
    return next((what for what, of_kind in patterns.items() if _matches(name, of_kind)), None)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
