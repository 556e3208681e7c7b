"""Titles and limits of the fields of run forms: one name for each kind of field, the same in every form.

Prefect takes a field's help from the docstring's `Args:` and names it after its parameter; `label` sets the title that
a person reads. Everything else here is JSON Schema, which the server checks before it makes a run.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field


def label(title: str, **limits: Any) -> Any:
    """Returns a field with a title and limits for the form. Limits are those of pydantic: `ge`, `min_length`, ..."""
    return Field(json_schema_extra={"title": title}, **limits)


ChainUrl = Annotated[str, label("Chain", min_length=1)]
Chains = Annotated[list[Annotated[str, Field(min_length=1)]], label("Chains")]
VersionNumber = Annotated[int, label("Version", ge=0)]
VersionName = Annotated[str, label("Version", min_length=1)]
RunsDir = Annotated[str | None, label("Folder of all runs", min_length=1)]
StageNames = Annotated[list[Literal["sft", "dpo", "grpo"]], label("Stages")]
