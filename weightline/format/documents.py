"""Parses the JSON of a bucket's small objects, which every writer of the bucket can forge, under limits.

The limits apply before a model of pydantic sees the document, so no field has to repeat them.
"""

from __future__ import annotations

import json
from typing import Annotated

from pydantic import Field

from weightline.errors import InputError

#: Of a manifest (format 1) or shortcut.
MAX_MANIFEST_NBYTES = 256 * 1024 * 1024
#: Of the header of a version in format 2.
MAX_HEADER_NBYTES = 1024 * 1024
#: Of a list of assets or a provenance.
MAX_LIST_NBYTES = 16 * 1024 * 1024
#: Of a record, whose fields are its writer's.
MAX_RECORD_NBYTES = 16 * 1024 * 1024
#: Of a ref, horizon, lease, signature or hint: a few fields.
MAX_NOTE_NBYTES = 1024 * 1024

_MAX_INTEGER = (1 << 63) - 1
_MAX_DIGITS = 20

#: Characters.
MAX_LABEL_LENGTH = 1024
MAX_NOTE_LENGTH = 65536

Count = Annotated[int, Field(ge=0, le=_MAX_INTEGER)]
#: A word or a line: the name of a stage or a run, a time, a coding.
Label = Annotated[str, Field(max_length=MAX_LABEL_LENGTH)]
#: A text of a writer's own: a URL, a path, a library's version.
Note = Annotated[str, Field(max_length=MAX_NOTE_LENGTH)]


def require_text(name: str, text: str, max_length: int) -> None:
    """Raises InputError for a text that is too long for a bucket's object, or that UTF-8 cannot write."""
    if len(text) > max_length:
        raise InputError(f"{name} has {len(text)} characters: use at most {max_length}", field=name)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is {text[:50]!r}, which holds half of a surrogate pair", field=name) from error


def parse_json(raw: bytes) -> object:
    """Returns the document. ValueError for what is not JSON in UTF-8, nests too deep, or breaks a limit.

    Refused are integers that do not fit into 64 bits and strings that hold half of a surrogate pair, which no encoder
    writes out again.
    """
    text = raw.decode("utf-8-sig")
    try:
        document: object = json.loads(text, parse_int=_bounded_integer)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(document, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it nests too deep") from error
    except UnicodeEncodeError as error:
        raise ValueError("a string holds half of a surrogate pair") from error
    return document


def _bounded_integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS or not -_MAX_INTEGER <= int(digits) <= _MAX_INTEGER:
        raise ValueError(f"the number {digits[:20]}... ({len(digits)} digits) does not fit into 64 bits")
    return int(digits)
