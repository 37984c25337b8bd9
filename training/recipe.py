"""Recipes: YAML files, with single keys replaced from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

Config = TypeVar("Config", bound=BaseModel)


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the key."""


def read_recipe(path: Path, changes: Sequence[str], kind: type[Config]) -> Config:
    """The recipe in ``path`` with ``key=value`` changes; unknown keys are refused."""
    values = read_mapping(path)
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise RecipeError(f"--set {change}: write key=value")
        values[key] = yaml.safe_load(value)
    try:
        return kind.model_validate(values, context={"directory": path.parent})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise RecipeError(f"{path}: {where}: {first['msg']}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds."""
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected a mapping")
    return values
