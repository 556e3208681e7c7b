"""Finds the files of a checkpoint folder that hold its weights.

It chooses the files that the loaders of transformers and peft choose. Where loaders would differ, it is an InputError.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from weightline.chain.files.other_formats import remedy_for
from weightline.errors import InputError

_WHOLE = "model.safetensors"

_ADAPTER = "adapter_model.safetensors"

_INDEX_SUFFIX = ".safetensors.index.json"

#: How a pointer of Git LFS begins, and how large it is at most.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_POINTER_NBYTES = 1024

#: The tensors to read from each file; None means all tensors of the file.
WeightFiles = dict[Path, frozenset[str] | None]

#: The file that makes a folder an adapter's (peft).
ADAPTER_CONFIG = "adapter_config.json"


class _Index(BaseModel):
    """The part of a safetensors index that is read."""

    model_config = ConfigDict(frozen=True, strict=True)

    weight_map: dict[str, str]


def weight_files(folder: Path) -> WeightFiles:
    """Returns the weight files of a checkpoint folder, and the tensors to read from each.

    Chooses an adapter's file if there is an adapter's configuration, else the files that the index names, else
    model.safetensors, else the only safetensors file. InputError when nothing is found, when a file that the index
    names is missing, and when the choice is ambiguous.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist: name a checkpoint folder", path=str(folder))
    if is_file_there(folder / ADAPTER_CONFIG) and is_file_there(folder / _ADAPTER):
        return {folder / _ADAPTER: None}
    index = index_of(folder)
    if index is not None:
        return _indexed(folder, index)
    found = [path for path in sorted(folder.glob("*.safetensors")) if is_file_there(path)]
    chosen = [path for path in found if path.name == _WHOLE] or found
    if not chosen:
        raise InputError(f"{folder} holds no *.safetensors: {remedy_for(folder)}", path=str(folder))
    if len(chosen) > 1:
        raise InputError(
            f"{folder} holds {len(chosen)} files of weights ({chosen[0].name}, {chosen[1].name}, ...) and no "
            f"model{_INDEX_SUFFIX}: save the model again with its index, or leave only one file there",
            path=str(folder),
        )
    return {chosen[0]: None}


def is_file_there(path: Path) -> bool:
    """Returns whether the path is a file.

    InputError for a link without a target, as a cleaned cache of the Hub leaves them, and for a pointer of Git LFS, as
    a clone without LFS leaves them.
    """
    if path.is_symlink() and not path.exists():
        raise InputError(
            f"{path} is a link to {path.readlink()}, which does not exist: the checkpoint is not whole. "
            "Download it again",
            path=str(path),
        )
    is_there = path.is_file()
    if is_there and path.stat().st_size <= _MAX_POINTER_NBYTES and path.read_bytes().startswith(_LFS_POINTER):
        raise InputError(
            f"{path} is a pointer of Git LFS, not the file itself: the checkpoint is not whole. Run `git lfs pull` in "
            f"{path.parent}",
            path=str(path),
        )
    return is_there


def index_of(folder: Path) -> Path | None:
    """Returns the index of the folder: the model's own one, else one of another name without a model.safetensors.

    InputError for two indexes without the model's own one.
    """
    own = folder / f"model{_INDEX_SUFFIX}"
    if is_file_there(own):
        return own
    if is_file_there(folder / _WHOLE):
        return None
    found = sorted(folder.glob(f"*{_INDEX_SUFFIX}"))
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise InputError(f"{folder} holds {names}: leave only the index of the model", path=str(folder))
    return found[0] if found else None


def _indexed(folder: Path, index: Path) -> WeightFiles:
    try:
        weight_map = _Index.model_validate_json(index.read_bytes()).weight_map
    except ValidationError as error:
        what = error.errors(include_url=False)[0]["msg"]
        raise InputError(f"{index} is not an index of weights: {what}", path=str(index)) from error
    names: dict[str, set[str]] = defaultdict(set)
    for name, file_name in weight_map.items():
        names[file_name].add(name)
    for file_name in sorted(names):
        if Path(file_name).name != file_name or not is_file_there(folder / file_name):
            raise InputError(
                f"{index} names {file_name!r}, which {folder} does not hold: the checkpoint is not whole",
                path=str(folder), missing=file_name,
            )  # fmt: skip
    if is_file_there(folder / _WHOLE) and _WHOLE not in names:
        raise InputError(
            f"{folder} holds {_WHOLE} and {index.name}, which names other files: remove the one that is outdated",
            path=str(folder),
        )
    return {folder / file_name: frozenset(names[file_name]) for file_name in sorted(names)}
