"""The canonical exchange: what every dialect is parsed to, and what the gate works on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from models.inputs import GuardInput, Turn
from models.taxonomy import Role
from models.verdict import Verdict
from service.errors import SluicegateError
from service.sse import Event

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
    is_joint: bool = False
    """Whether it joins what stands in several turns, each judged by itself too."""


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A prompt of token ids, which the upstream's tokenizer has to turn into a text."""

    path: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModerationRequest:
    """OpenAI's ``moderation`` key: tell the verdicts, and in which directions a flag blocks."""

    blocks_prompt: bool
    blocks_response: bool


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request as the gate sees it; ``body`` is the client's JSON, never changed.

    ``unscannable`` holds the paths of what no guard here can read. Where there are
    ``token_prompts``, their texts are added to ``texts``, by path, before anything is judged.
    """

    model: str
    stream: bool
    choices: int
    fields: tuple[Field, ...]
    body: Mapping[str, Any]
    unscannable: tuple[str, ...] = ()
    token_prompts: tuple[TokenPrompt, ...] = ()
    texts: Mapping[str, str] | None = None
    moderation: ModerationRequest | None = None
    context: tuple[Turn, ...] = ()
    """The turns that an answer follows."""
    instruction: str = ""
    """What this attempt told the model beside what the client said; an answer may repeat it."""
    asked_again: tuple[int, ...] = ()
    """The choices that this attempt is for, where it is not the first."""


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
    unscannable: tuple[str, ...] = ()
    own_keys: frozenset[str] = frozenset()
    """Keys of ``body`` that say what the request did not: judged with a choice, and no other."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What stands in place of a refused choice."""

    text: str
    finish_reason: Literal["stop", "content_filter"]


@dataclass(frozen=True, slots=True)
class Retry:
    """How the next attempt differs: its seed, what to tell the model, the choices it is for."""

    seed: int
    instruction: str
    choices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Annotations:
    """Verdicts that a client asked to be told beside the answer.

    ``openai`` and ``azure`` say in which shapes. A verdict is None where none could be had;
    ``choices`` is empty where nothing was generated.
    """

    guard: str
    prompt: Verdict | None
    choices: Mapping[int, Verdict | None]
    refused: frozenset[int]
    openai: bool
    azure: bool


class Said(NamedTuple):
    """A text that an event of a stream adds to a track of a choice.

    ``track`` is where it would stand in a whole answer, as ``choices[0].message.content``: texts of
    one track follow each other.
    """

    choice: int
    name: FieldName
    track: str
    text: str


class Heard(NamedTuple):
    """What one event of a stream holds.

    ``said`` is every text in it that a client could read, however unknown its key, but for words
    where words belong. ``choices`` are those that it speaks of; ``ends`` those of which nothing
    more comes. ``is_last`` tells that the stream is complete with it.
    """

    said: tuple[Said, ...] = ()
    choices: frozenset[int] = frozenset()
    ends: frozenset[int] = frozenset()
    unscannable: tuple[str, ...] = ()
    is_last: bool = False


class StreamReader(Protocol):
    """Reads the stream of one attempt, event by event, and can end it before its end.

    It is told of every event that was heard and, in the same order, of each that was sent to the
    client: what may be heard and never sent must leave no trace in what it renders.
    """

    def hear(self, event: Event) -> Heard:
        """What ``event`` says. Raises ``UpstreamMalformed`` or ``BadRequest`` where it cannot be
        read, tells of an error, or says more after the end.
        """

    def answer(self) -> Answer:
        """The answer that all events heard add up to, for its usage and for what is kept of it.

        Raises as ``hear`` does, also where the stream is not complete.
        """

    def without(self, event: Event, choices: frozenset[int]) -> bytes:
        """``event`` without what it says of these choices; empty where nothing is left."""

    def sent(self, event: Event) -> None:
        """``event`` went to the client, whole or in part."""

    def cut(self, choice: int) -> bytes:
        """Ends a choice of which something was sent, as the dialect ends one that is filtered."""

    def spoken(self, choice: Choice) -> bytes:
        """A choice that is not of this attempt (a refusal, or another attempt's), as events of this
        stream, which has begun. Only where a stream can have several choices.
        """

    def kept(self) -> Mapping[str, Any] | None:
        """The answer as it was cut, for a dialect that keeps answers; None where none is."""

    def end(self) -> bytes:
        """Ends the stream, in place of what the upstream would have ended it with: usage, where it
        was asked for and heard of, and the last event. Empty where ``cut`` did it.
        """


class Dialect(Protocol):
    """A wire format: parses to the canonical exchange and renders back. Knows nothing else."""

    name: str
    path: str
    """Where the upstream serves it, and we do."""
    schema: Mapping[str, Any]
    """JSON Schema of a request, as far as we read it."""

    def parse(self, body: Mapping[str, Any]) -> Exchange:
        """The exchange in a request; ``BadRequest`` names the key that is wrong."""

    def parse_answer(self, exchange: Exchange, body: Mapping[str, Any]) -> Answer:
        """The upstream's JSON answer; ``UpstreamMalformed`` if it is not one, or ``BadRequest``
        where a part of it is not what the format allows.
        """

    def parse_stream(self, exchange: Exchange, events: list[str]) -> Answer:
        """The answer that the data of all events of a stream add up to.

        Raises as ``parse_answer`` does, also where it is not complete.
        """

    def forwarded(self, exchange: Exchange) -> Mapping[str, Any] | None:
        """The body to send upstream where it must differ from the client's, else None."""

    def retried(self, exchange: Exchange, retry: Retry) -> Mapping[str, Any]:
        """The body of another attempt."""

    def refused(
        self, exchange: Exchange, identity: str, created: int, refusal: Refusal
    ) -> Answer | None:
        """An answer that only refuses; ``created`` in unix seconds. None where the format has no
        place for one.
        """

    def refused_choice(self, exchange: Exchange, index: int, refusal: Refusal) -> Choice:
        """One refusing choice."""

    def renumbered(self, choice: Choice, index: int) -> Choice:
        """``choice`` under another number."""

    def assembled(self, answer: Answer, choices: tuple[Choice, ...]) -> Mapping[str, Any]:
        """``answer`` with other choices in it, as JSON. Nothing else that it said is kept."""

    def annotated(self, body: Mapping[str, Any], annotations: Annotations) -> Mapping[str, Any]:
        """``body`` with the verdicts that were asked for beside what it says."""

    def annotated_stream(self, raw: bytes, annotations: Annotations) -> bytes:
        """``raw``, a whole stream of the upstream's, with the verdicts in an event of their own."""

    def streamed(self, exchange: Exchange, body: Mapping[str, Any]) -> bytes:
        """A JSON answer as the events of a stream, to its end."""

    keep_alive: bytes
    """What keeps a stream open without saying anything: clients pass over it."""

    def reader(self, exchange: Exchange) -> StreamReader:
        """Reads the stream of an attempt at ``exchange``."""

    def error_event(self, error: SluicegateError, identity: str) -> bytes:
        """An error in a stream that has begun, and the stream's end."""

    def error(self, error: SluicegateError, identity: str) -> Mapping[str, Any]:
        """The body of an error; ``identity`` is the request's id."""
