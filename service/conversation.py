"""A conversation, whatever the dialect: its messages become turns and fields."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from models.inputs import GuardInput, Speaker, Turn
from models.taxonomy import Role
from service.exchange import Field
from service.extractor import Piece

_CONTEXT_TURNS: Final = 8
"""Turns before a message that its judgement may look at: far more than a guard reads of them."""
_JOINED_TURNS: Final = 4
_JOINED_CHARACTERS: Final = 2000


@dataclass(frozen=True, slots=True)
class Message:
    """One message: who speaks, what later judgements see of it, and all that is judged of it."""

    speaker: Speaker
    text: str
    pieces: tuple[Piece, ...]


def turns(messages: Sequence[Message]) -> tuple[Turn, ...]:
    """The newest turns, as the context of an answer to them."""
    said = [message for message in messages if message.text]
    return tuple(Turn(message.speaker, message.text) for message in said[-_CONTEXT_TURNS:])


def fields(messages: Sequence[Message], path: str = "messages") -> Iterator[Field]:
    """All that the messages say, which stand at ``path``. What a model wrote is judged as a
    response, the rest as prompts.

    An assistant's message at the end is what the client puts into the model's mouth: a prefill. One
    before that was answered, and so was whatever stands before it, but for the system's words.
    """
    last_answer = max(
        (i for i, one in enumerate(messages[:-1]) if one.speaker == "assistant"), default=-1
    )
    said: list[Turn] = []
    for number, message in enumerate(messages):
        context = tuple(said[-_CONTEXT_TURNS:])
        is_past = number <= last_answer and message.speaker != "system"
        is_last = number == len(messages) - 1
        for piece in message.pieces:
            is_prefill = is_last and message.speaker == "assistant" and piece.name == "text"
            name = "prefill" if is_prefill else piece.name
            judged = GuardInput(role_of(message.speaker), piece.text, context)
            yield Field(name, piece.path, judged, is_past)
        if message.text:
            said.append(Turn(message.speaker, message.text))
    yield from _joint(messages, path)


def _joint(messages: Sequence[Message], path: str) -> Iterator[Field]:
    """The user's newest turns as one text: an attack that is split over turns is whole in it.

    A guard sees it better so than with the earlier turns as context.
    """
    if not messages or messages[-1].speaker != "user":
        return
    words = [one.text for one in messages if one.speaker == "user" and one.text][-_JOINED_TURNS:]
    if len(words) > 1:
        text = "\n".join(words)[-_JOINED_CHARACTERS:]
        yield Field("message", path, GuardInput("prompt", text), is_joint=True)


def answer_fields(context: tuple[Turn, ...], message: Message) -> tuple[Field, ...]:
    """What a model's message says, as an answer to the turns before it."""
    return tuple(
        Field(piece.name, piece.path, GuardInput("response", piece.text, context))
        for piece in message.pieces
    )


def role_of(speaker: Speaker) -> Role:
    """How a guard judges what ``speaker`` says."""
    return "response" if speaker == "assistant" else "prompt"


def prompt_fields(pieces: Sequence[Piece]) -> Iterator[Field]:
    """Pieces that stand outside of any turn."""
    for piece in pieces:
        yield Field(piece.name, piece.path, GuardInput("prompt", piece.text))
