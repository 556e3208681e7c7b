"""Object keys of a chain, relative to the bucket prefix that the chain's URL names. SPEC "Objects and keys"."""

from __future__ import annotations

import re

from weightline.errors import InputError

COMMITS = "commits/"
SHORTCUTS = "shortcuts/"
PAYLOADS = "payloads/"
ASSETS = "assets/"
LAYOUTS = "layouts/"
DIGESTS = "digests/"
PROVENANCE = "provenance/"
#: Objects whose keys name their content: several versions share one, and it may be put again at any time.
SHARED = (ASSETS, LAYOUTS, DIGESTS, PROVENANCE)
RECORDS = "records/"
LEASES = "records/replicas/"
REFS = "refs/"
SIGNATURES = "signatures/"
HISTORY = "history/"
FORMATS = "formats/"
PROBES = "probes/"
TIP_HINT = "hints/tip.json"

#: No key, but a name that no asset may have: the file that says which version a folder of weights holds.
VERSION_MARK = "weightline.json"

#: Numbers of versions are signed integers of 64 bits.
MAX_VERSION = (1 << 63) - 1
_VERSION_DIGITS = 20
_DIGITS = re.compile(rf"[0-9]{{{_VERSION_DIGITS}}}")
_SHORTCUT = re.compile(rf"{SHORTCUTS}(?P<version>[0-9]{{20}})-(?P<base>anchor|[0-9]{{20}})\.json")
_MAX_PATH = 512
_PATH_NAME = re.compile(r"(?![. ])[^/\\:*?\"<>|]{1,128}(?<![. ])")
#: Files that every pulled folder has of its own.
_RESERVED_SUFFIXES = (".safetensors", ".safetensors.index.json")
_REF = re.compile(rf"{REFS}[A-Za-z0-9][A-Za-z0-9._-]{{0,127}}/[0-9]{{{_VERSION_DIGITS}}}\.json")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def padded(version: int) -> str:
    """Returns a version as text with 20 digits, so that text order is number order."""
    return f"{version:0{_VERSION_DIGITS}d}"


def commit(version: int) -> str:
    """Returns the key of a version's manifest. The version exists exactly when this object does."""
    return f"{COMMITS}{padded(version)}.json"


def version_of(digits: str) -> int | None:
    """Returns the version that a part of a key stands for; None for any text but one that `padded` returns."""
    return int(digits) if _DIGITS.fullmatch(digits) is not None and int(digits) <= MAX_VERSION else None


def version_of_commit(key: str) -> int | None:
    """Returns the version of a manifest's key; None for any other key."""
    digits = key.removeprefix(COMMITS).removesuffix(".json")
    return version_of(digits) if key == f"{COMMITS}{digits}.json" else None


def shortcut(base_version: int | None, version: int) -> str:
    """Returns the key of a shortcut to a version, from another base or from nothing (an anchor)."""
    return f"{SHORTCUTS}{padded(version)}-{'anchor' if base_version is None else padded(base_version)}.json"


def ends_of_shortcut(key: str) -> tuple[int | None, int] | None:
    """Returns (base_version, version) of a shortcut's key; None for any other key."""
    found = _SHORTCUT.fullmatch(key)
    return found and (None if found["base"] == "anchor" else int(found["base"]), int(found["version"]))


def payload(version: int, commit_id: str, rank: int) -> str:
    """Returns the key of one rank's payload. The commit_id makes it unique to one attempt to commit."""
    return f"{PAYLOADS}{padded(version)}/{commit_id}/rank-{rank:05d}.safetensors"


def asset(sha256: str) -> str:
    """Returns the key of a small file of the model (config.json, tokenizer), or of a list of them, by its content."""
    return f"{ASSETS}{sha256}"


def layout(sha256: str) -> str:
    """Returns the key of a layout, by its content."""
    return f"{LAYOUTS}{sha256}"


def digests(sha256: str) -> str:
    """Returns the key of a list of digests, by its content."""
    return f"{DIGESTS}{sha256}"


def provenance(sha256: str) -> str:
    """Returns the key of a provenance, by its content."""
    return f"{PROVENANCE}{sha256}"


def upgrade(number: int) -> str:
    """Returns the key of the mark by which a chain goes on in a newer format from its next version on."""
    return f"{FORMATS}weightline-{number}.json"


def record(kind: str, version: int, name: str) -> str:
    """Returns the key of a record about a version after its commit: an evaluation, a refresh, an announcement."""
    return f"{RECORDS}{checked_name(kind)}/{padded(version)}/{checked_name(name)}.json"


def lease(replica: str) -> str:
    """Returns the key of a replica's lease, which is replaced at every renewal."""
    return f"{LEASES}{checked_name(replica)}/lease.json"


def signature(subject: str, sha256: str, key_id: str) -> str:
    """Returns the key of a signature of the object `subject`.

    It contains the sha256 of the object, so that racing writers do not share a signature.
    """
    return f"{SIGNATURES}{subject}/{sha256}-{key_id}.json"


def subject_of_signature(key: str) -> str:
    """Returns the key of the object that a signature signs."""
    return key.removeprefix(SIGNATURES).rpartition("/")[0]


def ref(name: str, number: int) -> str:
    """Returns the key of a ref's move. Each move is an object of its own, so that the history of a ref is kept."""
    return f"{REFS}{checked_name(name)}/{padded(number)}.json"


def is_ref(key: str) -> bool:
    """Whether the key is a move of a ref: other objects below `refs/` say nothing."""
    return _REF.fullmatch(key) is not None


def is_name(text: str) -> bool:
    """Returns whether the text is allowed as a name in a key."""
    return _NAME.fullmatch(text) is not None


def checked_name(name: str) -> str:
    """Returns the name. InputError for a name that is not allowed in a key."""
    if not is_name(name):
        raise InputError(
            f"{name!r} cannot be part of an object key: use 1 to 128 letters, digits, '.', '_' or '-', "
            "starting with a letter or digit",
            name=name,
        )
    return name


def checked_path(path: str) -> str:
    """Returns the path of an asset below a model's folder when it stays inside that folder; InputError otherwise.

    Its names are printable, begin with no dot, and are valid on every file system.
    """
    names = path.split("/")
    is_safe = path.isprintable() and all(_PATH_NAME.fullmatch(name) for name in names)
    is_reserved = len(names) == 1 and (path.lower().endswith(_RESERVED_SUFFIXES) or path.lower() == VERSION_MARK)
    if not is_safe or is_reserved or len(path) > _MAX_PATH or any(len(name.encode()) > 255 for name in names):
        raise InputError(
            f"{path!r} cannot be the path of a model's small file: use names of 1 to 128 printable characters, "
            "separated by '/', that neither begin with '.' nor contain \\ : * ? \" < > |, nor are those of weights",
            name=path,
        )
    return path
