"""For tests of streams: an upstream that streams as it is told, and how each dialect streams."""

import asyncio
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from aiohttp import web

from service import messages_stream, responses_stream
from tests.fake_upstream import Answer, FakeUpstream, Received, compact, pieces
from tests.service.rig import BAD, GRAVE, SAFE
from tests.service.test_anthropic_sdk import message
from tests.service.test_responses import response, said

LONG = "The weather on the hills is fine again today, and it will stay so. " * 12
BAD_FIRST = f"First {BAD}. {LONG}"
CUT = f"{LONG}And {GRAVE}. {LONG}"
POLICY = {
    "version": 1,
    "id": "streams",
    "rules": [
        {"severity": "moderate", "action": "block"},
        {"direction": "response", "severity": "minor", "action": "regenerate"},
        {"action": "allow"},
    ],
    "regenerate": {"rounds": 2},
}


# --- An upstream that streams as it is told ----------------------------------------------------
@dataclass(frozen=True, slots=True)
class Streamed(Answer):
    """A stream in writes of its own, ``pause`` seconds apart.

    At a part that is None it waits until it is told to go on. ``then`` is what comes after the
    last: the end, a reset of the connection, nothing at all, or the last part for ever.
    """

    parts: tuple[bytes | None, ...] = ()
    then: Literal["end", "reset", "stall", "flood"] = "end"


class Streams(FakeUpstream):
    """A fake upstream that gives ``Streamed`` answers too."""

    def __init__(self) -> None:
        super().__init__()
        self.goes_on = asyncio.Event()
        self.stalls = threading.Event()
        """Set while an answer says nothing any more."""

    async def forget(self) -> None:
        """Begins anew: nothing was received. On the server's own loop it comes behind all that an
        earlier client still had to tell.
        """
        self.received.clear()
        self.disconnected.clear()
        self.goes_on.clear()
        self.stalls.clear()

    async def _send(
        self, request: web.Request, received: Received, answer: Answer
    ) -> web.StreamResponse:
        if not isinstance(answer, Streamed):
            return await super()._send(request, received, answer)
        await self._pause(answer.delay)
        shown = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await shown.prepare(request)
        for part in answer.parts:
            if part is None:
                await self.goes_on.wait()
                continue
            await shown.write(part)
            await self._pause(answer.pause)
        while answer.then == "flood":
            await shown.write(answer.parts[-1] or b"")
        if answer.then == "stall":
            self.stalls.set()
            await self._pause(None)
        if answer.then == "reset":
            assert request.transport is not None
            held = os.dup(request.transport.get_extra_info("socket").fileno())
            with socket.socket(fileno=held) as own:
                own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.transport.abort()
            return shown
        await shown.write_eof()
        return shown


# --- How each dialect streams ------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Wire:
    """A dialect as an upstream streams it. ``events`` makes all events of a text, in pieces."""

    name: str
    path: str
    request: Mapping[str, Any]
    events: Callable[[str], list[bytes]]
    error: bytes
    normal: str
    filtered: str

    def growing(self, text: str) -> list[bytes]:
        """The events of a text to which more may come."""
        every = self.events(text)
        while not _texts(self.name, [every[-1]]):
            every.pop()
        return every


def data(value: Mapping[str, Any]) -> bytes:
    """An event without a name."""
    return b"data: " + compact(value) + b"\n\n"


def _chunks(name: str) -> Callable[[str], list[bytes]]:
    kind = {"chat": "chat.completion.chunk", "completions": "text_completion"}[name]

    def chunk(piece: str, end: str | None = None, **delta: str) -> bytes:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": end}
        choice |= {"delta": {**delta, "content": piece}} if name == "chat" else {"text": piece}
        return data({"id": "c1", "object": kind, "created": 7, "model": "m", "choices": [choice]})

    def events(text: str) -> list[bytes]:
        first = [chunk("", role="assistant")] if name == "chat" else []
        middle = [chunk(piece) for piece in pieces(text)]
        return [*first, *middle, chunk("", "stop"), b"data: [DONE]\n\n"]

    return events


def _in_deltas(events: list[Mapping[str, Any]], place: str, key: str) -> list[Mapping[str, Any]]:
    """Events whose one delta is cut into pieces."""
    shown: list[Mapping[str, Any]] = []
    for event in events:
        if event["type"] != place:
            shown.append(event)
        elif isinstance(event["delta"], str):
            shown += ({**event, "delta": piece} for piece in pieces(event["delta"]))
        else:
            cut = pieces(event["delta"][key])
            shown += ({**event, "delta": {**event["delta"], key: piece}} for piece in cut)
    return shown


def message_events(block: dict[str, Any], place: str = "text") -> list[bytes]:
    """A message of one block, as a stream of many deltas."""
    whole = list(messages_stream.events({"stop_sequence": None, **message(block)}))
    cut = _in_deltas(whole, "content_block_delta", place)
    return [messages_stream.encoded([event]) for event in cut]


def response_events(item: dict[str, Any], place: str = "response.output_text.delta") -> list[bytes]:
    """A response of one item, as a stream of many deltas."""
    raw = responses_stream.encoded(response(item)).decode().strip().split("\n\n")
    whole = [json.loads(event.partition("data: ")[2]) for event in raw]
    return [
        f"event: {event['type']}\n".encode() + data({**event, "sequence_number": number})
        for number, event in enumerate(_in_deltas(whole, place, ""))
    ]


_TURNS = {"model": "m", "messages": [{"role": "user", "content": SAFE}]}
_ERROR = {"message": "it broke: severe-violence", "type": "server_error", "code": 500}
WIRES = {
    wire.name: wire
    for wire in (
        Wire(
            "chat", "/v1/chat/completions", _TURNS, _chunks("chat"),
            data({"error": _ERROR}), "stop", "content_filter",
        ),
        Wire(
            "completions", "/v1/completions", {"model": "m", "prompt": SAFE},
            _chunks("completions"), data({"error": _ERROR}), "stop", "content_filter",
        ),
        Wire(
            "messages", "/v1/messages", {**_TURNS, "max_tokens": 99},
            lambda text: message_events({"type": "text", "text": text}),
            b"event: error\n" + data({"type": "error", "error": _ERROR}), "end_turn", "refusal",
        ),
        Wire(
            "responses", "/v1/responses", {"model": "m", "input": SAFE},
            lambda text: response_events(said(text)),
            b"event: error\n" + data({"type": "error", **_ERROR}), "completed", "incomplete",
        ),
    )
}  # fmt: skip


_BEFORE_HARM = 120
"""So many events of ``CUT`` come before what is bad in it, on any wire."""


def written(events: list[bytes], **changes: Any) -> Streamed:
    """A stream of these, a write for each dozen. Behind what begins as ``CUT`` does, it waits until
    the client has heard something.
    """
    parts = [b"".join(events[n : n + 12]) for n in range(0, len(events), 12)]
    wait = _BEFORE_HARM // 12
    behind = (None, *parts[wait:]) if len(parts) > wait else ()
    return Streamed(parts=(*parts[:wait], *behind), **changes)


# --- What a client sees ------------------------------------------------------------------------
def data_of(raw: bytes) -> list[str]:
    """The data of all events, in order."""
    return [line[6:] for line in raw.decode().splitlines() if line.startswith("data: ")]


def _texts(name: str, events: list[bytes]) -> str:
    """What a stream says, read in no way but by its deltas."""
    text = ""
    for one in data_of(b"".join(events)):
        event = {} if one == "[DONE]" else json.loads(one)
        match name:
            case "chat":
                deltas = [choice["delta"] for choice in event.get("choices", ())]
                text += "".join(delta.get("content") or "" for delta in deltas)
            case "completions":
                text += "".join(choice["text"] for choice in event.get("choices", ()))
            case "messages" if event["type"] == "content_block_delta":
                text += event["delta"].get("text", "")
            case "responses" if event["type"] == "response.output_text.delta":
                text += event["delta"]
    return text


def text_of(wire: Wire, raw: bytes) -> str:
    """The text of a stream."""
    return _texts(wire.name, [raw])
