"""Parses recipe files: YAML to a frozen `Recipe`. Each error is one `RecipeError` that names field and remedy."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from weightline.errors import RecipeError
from weightline.files import user_path
from weightline.stages.recipe import Recipe


def load_recipe(recipe: str | Path) -> Recipe:
    """Reads and validates a recipe file, or the shipped recipe of that name when there is no such file.

    Raises RecipeError (facts: `field`, `remedy`) for a file that cannot be read, is not YAML, or breaks a rule.
    """
    path = _find_recipe(recipe)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        remedy = f"give the path of a recipe file, or the name of a shipped recipe ({', '.join(shipped_recipes())})"
        raise recipe_error("recipe", f"{path} cannot be read: {error}", remedy) from error
    except yaml.YAMLError as error:
        raise recipe_error("recipe", f"{path} is not YAML: {error}", "correct the syntax at that place") from error
    if not isinstance(raw, Mapping):
        raise recipe_error("recipe", f"{path} holds no fields", "start from a shipped recipe")
    return parse_recipe(raw)


def shipped_recipes() -> dict[str, Traversable]:
    """Returns the recipe files that are part of the package, by their names on the command line."""
    folder = files("weightline") / "deployments" / "recipes"
    found = sorted(folder.iterdir(), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): file for file in found if file.name.endswith(".yaml")}


def parse_recipe(raw: Mapping[str, Any]) -> Recipe:
    """Validates a recipe that is already a mapping. RecipeError for the first invalid field."""
    try:
        return Recipe.model_validate(dict(raw))
    except ValidationError as error:
        # A misspelled name causes an unknown and a missing field. The error of the unknown one suggests the right name.
        found = sorted(error.errors(include_url=False), key=lambda details: details["type"] != "extra_forbidden")
        first, *others = found
        raise _explain(first, len(others)) from error


def recipe_error(field: str, problem: str, remedy: str) -> RecipeError:
    """Returns a RecipeError with the text `field: problem. Remedy: remedy.`"""
    return RecipeError(f"{field}: {problem}. Remedy: {remedy}.", field=field, remedy=remedy)


def dotted(location: tuple[int | str, ...]) -> str:
    """Returns a location as text: ("stages", 0, "max_steps") -> "stages[0].max_steps"."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".") or "recipe"


def _find_recipe(recipe: str | Path) -> Path | Traversable:
    path = user_path(recipe)
    return path if path.is_file() else shipped_recipes().get(str(recipe), path)


def _explain(details: ErrorDetails, num_others: int) -> RecipeError:
    location = details["loc"]
    problem = details["msg"].removeprefix("Value error, ")
    if details["type"] == "extra_forbidden":
        problem, remedy = "unknown field", _suggest(str(location[-1]), _fields_at(location[:-1]))
    elif details["type"] == "missing":
        problem, remedy = "missing", "add this field"
    else:
        remedy = f"correct the value ({details['input']!r:.80})"
    if num_others:
        remedy += f" ({num_others} more to correct after this one)"
    return recipe_error(dotted(location), problem, remedy)


def _suggest(unknown: str, known: list[str]) -> str:
    close = difflib.get_close_matches(unknown, known, n=1)
    return f"did you mean `{close[0]}`?" if close else f"remove it; known fields: {', '.join(known)}"


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Returns the names of the fields at a location, by the annotations of Recipe."""
    model: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, str):
            model = _model_in(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := _model_in(part))), None)
