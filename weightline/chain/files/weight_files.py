"""Which files of a checkpoint folder hold its weights: those that loaders would read, or an error where they differ."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from weightline.chain.files.assets import ADAPTER_CONFIG
from weightline.errors import InputError

_WHOLE = "model.safetensors"
_ADAPTER = "adapter_model.safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"

#: The tensors to take from each file; None: all that it holds.
WeightFiles = dict[Path, frozenset[str] | None]


class _Index(BaseModel):
    """What an index says. Other fields are for people."""

    model_config = ConfigDict(frozen=True, strict=True)

    weight_map: dict[str, str]


def weight_files(folder: Path) -> WeightFiles:
    """An adapter's file where there is an adapter's configuration; else what the index names; else model.safetensors.

    A folder without any of these may hold one file of another name. InputError when nothing is found, when a file that
    the index names is missing, and when it cannot be told which files are the model's.
    """
    if (folder / ADAPTER_CONFIG).is_file() and (folder / _ADAPTER).is_file():
        return {folder / _ADAPTER: None}
    index = _index_of(folder)
    if index is not None:
        return _indexed(folder, index)
    found = sorted(folder.glob("*.safetensors"))
    chosen = [path for path in found if path.name == _WHOLE] or found
    if not chosen:
        raise InputError(f"{folder} holds no *.safetensors: name a checkpoint folder", path=str(folder))
    if len(chosen) > 1:
        raise InputError(
            f"{folder} holds {len(chosen)} files of weights ({chosen[0].name}, {chosen[1].name}, ...), and no "
            f"model{_INDEX_SUFFIX} says which are the model's: save it again with its index, or leave one file there",
            path=str(folder),
        )
    return {chosen[0]: None}


def _index_of(folder: Path) -> Path | None:
    """Loaders look for the model's own one; another one counts where there is no model.safetensors either."""
    own = folder / f"model{_INDEX_SUFFIX}"
    if own.is_file() or (folder / _WHOLE).is_file():
        return own if own.is_file() else None
    found = sorted(folder.glob(f"*{_INDEX_SUFFIX}"))
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise InputError(f"{folder} holds {names}: leave the one that is the model's", path=str(folder))
    return found[0] if found else None


def _indexed(folder: Path, index: Path) -> WeightFiles:
    try:
        weight_map = _Index.model_validate_json(index.read_bytes()).weight_map
    except ValidationError as error:
        what = error.errors(include_url=False)[0]["msg"]
        raise InputError(f"{index} is no index of weights: {what}", path=str(index)) from error
    names: dict[str, set[str]] = defaultdict(set)
    for name, file_name in weight_map.items():
        names[file_name].add(name)
    for file_name in sorted(names):
        if Path(file_name).name != file_name or not (folder / file_name).is_file():
            raise InputError(
                f"{index} names {file_name!r}, which {folder} does not hold: the checkpoint is not whole",
                path=str(folder), missing=file_name,
            )  # fmt: skip
    if (folder / _WHOLE).is_file() and _WHOLE not in names:
        raise InputError(
            f"{folder} holds {_WHOLE} and {index.name}, which names other files: remove the one that is left over",
            path=str(folder),
        )
    return {folder / file_name: frozenset(names[file_name]) for file_name in sorted(names)}
