"""Chooses the small files of a checkpoint folder: what a loader may read beside the weights, with their paths.

Everything belongs to a version but weights, states and logs of a training, data, pictures and hidden files. A folder
below that is a checkpoint of its own belongs to none. What is left out has a name and a reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from weightline.chain.files.weight_files import is_file_there
from weightline.errors import InputError
from weightline.format import keys

#: A larger file is left out.
MAX_ASSET_NBYTES = 64 * 1024 * 1024

#: A checkpoint folder has a few dozen small files.
MAX_FOLDER_ASSETS = 1000

_MAX_DEPTH = 8

#: Files that say which version a folder holds, and where a checkpoint's shards lie: a pulled folder has its own.
_OWN = ("weightline.json", "*.safetensors.index.json")

#: Pattern of a name -> what the file is. The first that fits counts.
_FOREIGN = {
    ".*": "hidden",
    "*.bin.index.json": "an index of other weights",
    "trainer_state.json": "of a training", "training_args.*": "of a training", "*_results.json": "of a training",
    "optimizer*": "of a training", "scheduler*": "of a training", "scaler*": "of a training",
    "rng_state*": "of a training", "random_states*": "of a training", "zero_to_fp32.py": "of a training",
    "latest": "of a training", "events.out.*": "a log", "*.log": "a log", "*.out": "a log", "*.err": "a log",
    "*.bin": "weights of another format", "*.pt": "weights of another format", "*.pth": "weights of another format",
    "*.ckpt": "weights of another format", "*.h5": "weights of another format", "*.ot": "weights of another format",
    "*.msgpack": "weights of another format", "*.gguf": "weights of another format",
    "*.onnx*": "weights of another format", "*.tflite": "weights of another format",
    "*.distcp": "weights of another format", "*.pkl": "a pickle", "*.pickle": "a pickle", "*.pyc": "compiled code",
    "*.jsonl": "data", "*.csv": "data", "*.parquet": "data", "*.arrow": "data", "*.db": "data", "*.zip": "an archive",
    "*.tar": "an archive", "*.gz": "an archive", "*.png": "a picture", "*.jpg": "a picture", "*.jpeg": "a picture",
    "*.gif": "a picture", "*.svg": "a picture", "*.webp": "a picture", "*.pdf": "a picture", "*.mp4": "a picture",
    "*.ipynb": "a notebook", "*.pem": "a key", "*.key": "a key", "*.lock": "a lock", "*.tmp": "a temporary file",
}  # fmt: skip

#: The same for folders.
_FOREIGN_FOLDERS = {
    ".*": "hidden", "checkpoint-*": "a checkpoint of its own", "tmp-checkpoint-*": "a checkpoint of its own",
    "global_step*": "of a training", "pytorch_model_fsdp*": "of a training", "optimizer*": "of a training",
    "runs": "logs", "logs": "logs", "wandb": "logs", "__pycache__": "compiled code",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SmallFiles:
    """The small files of a folder, as paths below it in the spelling of manifests."""

    taken: tuple[str, ...]
    left_out: tuple[str, ...]
    """What belongs to no version: its path, and why in brackets."""


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


def _described(name: str, patterns: dict[str, str]) -> str | None:
    return next((what for pattern, what in patterns.items() if fnmatchcase(name, pattern)), None)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
