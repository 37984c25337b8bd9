"""The canonical exchange: what every dialect is parsed to, and what the gate works on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from models.inputs import GuardInput
from models.taxonomy import Role

Direction = Role
"""``prompt``: towards the model. ``response``: from it."""

FieldName = Literal[
    "message",
    "system",
    "document",
    "tool_definition",
    "tool_result",
    "prefill",
    "other",
    "text",
    "reasoning",
    "tool_call",
    "refusal",
]


@dataclass(frozen=True, slots=True)
class Field:
    """A piece of text that is judged. ``path`` says where it stands on the wire."""

    name: FieldName
    path: str
    judged: GuardInput
    is_past: bool = False
    """Whether it belongs to a turn that was answered before."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request as the gate sees it; ``body`` is the client's JSON, never changed."""

    model: str
    stream: bool
    choices: int
    fields: tuple[Field, ...]
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the upstream's answers. ``body`` is its JSON object, never changed."""

    index: int
    fields: tuple[Field, ...]
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the upstream said: its choices, and the JSON around them."""

    choices: tuple[Choice, ...]
    body: Mapping[str, Any]
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """What stands in place of a refused choice."""

    text: str
    finish_reason: Literal["stop", "content_filter"]


@dataclass(frozen=True, slots=True)
class Retry:
    """How the next attempt differs: its seed, what to tell the model, and how many choices."""

    seed: int
    instruction: str
    choices: int


class Dialect(Protocol):
    """A wire format: parses to the canonical exchange and renders back. Knows nothing else."""

    name: str
    path: str
    """Where the upstream serves it."""

    def parse(self, body: Mapping[str, Any]) -> Exchange:
        """The exchange in a request; ``BadRequest`` names the key that is wrong."""

    def parse_answer(self, exchange: Exchange, body: Mapping[str, Any]) -> Answer:
        """The upstream's JSON answer; ``UpstreamMalformed`` if it is not one."""

    def parse_stream(self, exchange: Exchange, events: list[str]) -> Answer:
        """The answer that the data of all events of a stream add up to."""

    def forwarded(self, exchange: Exchange) -> Mapping[str, Any] | None:
        """The body to send upstream where it must differ from the client's, else None."""

    def retried(self, exchange: Exchange, retry: Retry) -> Mapping[str, Any]:
        """The body of another attempt."""

    def refused(self, exchange: Exchange, identity: str, created: int, refusal: Refusal) -> Answer:
        """An answer that only refuses; ``created`` in unix seconds."""

    def refused_choice(self, exchange: Exchange, index: int, refusal: Refusal) -> Choice:
        """One refusing choice."""

    def assembled(self, answer: Answer, choices: tuple[Choice, ...]) -> Mapping[str, Any]:
        """``answer`` with other choices in it, as JSON."""

    def streamed(self, exchange: Exchange, body: Mapping[str, Any]) -> bytes:
        """A JSON answer as the events of a stream, to its end."""
