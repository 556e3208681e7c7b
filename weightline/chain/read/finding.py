"""What verify has to say: things that do not hold, as values rather than errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from weightline.errors import (
    CorruptError,
    NotFoundError,
    SignatureError,
    StorageError,
    TransientStorageError,
    UnsupportedFeatureError,
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that does not hold."""

    rule: str
    subject: str
    message: str


@contextmanager
def noting(findings: list[Finding], rule: str, subject: str) -> Iterator[None]:
    """What the block meets in the bucket becomes a finding, and the block ends there. A bucket that is away raises."""
    try:
        yield
    except TransientStorageError:
        raise
    except SignatureError as error:
        findings.append(Finding("signature", subject, str(error)))
    except (CorruptError, UnsupportedFeatureError, NotFoundError, StorageError) as error:
        findings.append(Finding(rule, subject, str(error)))
