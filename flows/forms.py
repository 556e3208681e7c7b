"""Labels and limits of the run forms: one name a kind of field, so that it looks the same in every form.

Prefect takes a field's help from the docstring's `Args:`, and calls it by its parameter's name; `label` sets the name
that a person reads. Everything else here is JSON Schema, which the server checks before a run is made.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field


def label(title: str, **limits: Any) -> Any:
    """A field's name in the form, and its limits: `ge`, `le`, `min_length`, `pattern`."""
    return Field(json_schema_extra={"title": title}, **limits)


ChainUrl = Annotated[str, label("Chain", min_length=1)]
Chains = Annotated[list[Annotated[str, Field(min_length=1)]], label("Chains")]
VersionNumber = Annotated[int, label("Version", ge=0)]
VersionName = Annotated[str, label("Version", min_length=1)]
RunsDir = Annotated[str | None, label("Folder of all runs", min_length=1)]
StageNames = Annotated[list[Literal["sft", "dpo", "grpo"]], label("Stages")]
