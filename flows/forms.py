"""Defines titles and limits of the fields of run forms, so that a field has the same title in every form.

Prefect takes the help of a field from `Args:` in the flow's docstring, and by default uses the parameter's name as the
title; `label` sets another title. The limits become JSON Schema, which the server checks before it creates a run.
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
