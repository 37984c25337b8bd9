"""Prompts as OpenAI's older routes take them: texts, or the ids of their tokens.

Reference: OpenAI API, "Create completion" (``prompt``) and "Create embeddings" (``input``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from models.inputs import GuardInput
from service.errors import BadRequest
from service.exchange import Field, TokenPrompt

_IDS_SCHEMA: Final = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
PROMPT_SCHEMA: Final[Mapping[str, Any]] = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "items": {"type": "string"}},
        _IDS_SCHEMA,
        {"type": "array", "minItems": 1, "items": _IDS_SCHEMA},
    ]
}
"""JSON Schema of what ``parse_prompts`` reads."""

Prompt = str | tuple[int, ...]
"""A text, or the ids of its tokens."""


def parse_prompts(value: Any, key: str) -> Mapping[str, Prompt]:
    """A text, texts, token ids, or lists of these, by their places and in their order.

    ``BadRequest`` names what is none of them, or not of the kind of all others.
    """
    if isinstance(value, str):
        return {key: value}
    if not isinstance(value, list) or not value:
        raise BadRequest(
            f"{key} must be a string, a list of strings, token ids, or a list of lists of token"
            " ids, and not empty",
            param=key,
        )
    kind = type(value[0])
    for number, item in enumerate(value):
        if kind not in (str, int, list) or type(item) is not kind:
            place = f"{key}[{number}]"
            raise BadRequest(
                f"{place} must be a string, a token id or a list of token ids, as all others are",
                param=place,
            )
    if kind is int:
        return {key: _ids(value, key)}
    places = (f"{key}[{number}]" for number in range(len(value)))
    return {
        place: item if kind is str else _ids(item, place)
        for place, item in zip(places, value, strict=True)
    }


def text_fields(prompts: Mapping[str, Prompt]) -> tuple[Field, ...]:
    """The prompts that are texts."""
    return tuple(
        Field("message", place, GuardInput("prompt", prompt))
        for place, prompt in prompts.items()
        if isinstance(prompt, str) and prompt and not prompt.isspace()
    )


def token_prompts(prompts: Mapping[str, Prompt]) -> tuple[TokenPrompt, ...]:
    """The prompts that are token ids."""
    return tuple(
        TokenPrompt(place, prompt)
        for place, prompt in prompts.items()
        if not isinstance(prompt, str)
    )


def _ids(value: Sequence[Any], place: str) -> tuple[int, ...]:
    if not value:
        raise BadRequest(f"{place} must hold at least one token id", param=place)
    for number, item in enumerate(value):
        if type(item) is not int or item < 0:
            raise BadRequest(f"{place}[{number}] must be a token id", param=f"{place}[{number}]")
    return tuple(value)
