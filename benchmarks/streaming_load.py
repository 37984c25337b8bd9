"""An upstream that speaks at a pace, and clients that note when they hear it.

Both run in one process, so that what was said and what was heard are told by one clock. A stream is
known by a number, which its prompt tells.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, cast

from benchmarks import measure
from service.flow import Flow
from tests.fake_upstream import MODELS, Choice, Completion, events

RATE: Final = 20.0
"""Tokens a second of one stream."""
_MODEL: Final = "m"
_NUMBER: Final = re.compile(rb"case (\d+)\b")
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_TEXT: Final = re.compile(rb'"content": ?"[^"]')
_TOKEN: Final = re.compile(r"\s*(?:\w{1,6}|\S)")
_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_MODELS: Final = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
_END: Final = b"0\r\n\r\n"


# --- What is said ------------------------------------------------------------------------------
_WHO: Final = (
    "the gardener", "my neighbour", "a careful reader", "the town library", "an old carpenter",
    "the morning train", "our small bakery", "the weather service", "a school class",
    "the night watchman", "her younger brother", "the museum guide", "a travelling musician",
    "the mountain village", "the ferry company", "his first teacher",
)  # fmt: skip
_DOES: Final = (
    "prepares", "describes", "remembers", "carefully repairs", "looks after", "recommends",
    "writes about", "seldom forgets", "slowly improves", "collects", "explains", "often visits",
)  # fmt: skip
_WHAT: Final = (
    "the wooden bridge near the mill", "a simple recipe for bread", "the history of the harbour",
    "tomatoes that grow without much sun", "an exhibition of old maps", "a garden full of lavender",
    "the best way to learn a language", "long walks along the river", "the choir's summer concert",
    "a collection of pressed leaves", "the timetable of the local bus", "warm clothes for winter",
)  # fmt: skip
_WHEN: Final = (
    "before the first frost", "on most Sunday afternoons", "whenever there is time for it",
    "because the children ask for it", "although it takes a whole week", "after a good breakfast",
    "while the others are still asleep", "with the help of two friends", "for the third time now",
)  # fmt: skip


def prose(tokens: int, seed: int) -> tuple[str, ...]:
    """Harmless English of so many tokens or so, another for each seed."""
    dice = random.Random(seed)  # noqa: S311 - a text, not a secret
    found: list[str] = []
    while len(found) < tokens:
        words = [dice.choice(part) for part in (_WHO, _DOES, _WHAT, _WHEN)]
        sentence = " ".join(words)
        lead = " " if found else ""
        found += _TOKEN.findall(f"{lead}{sentence[0].upper()}{sentence[1:]}.")
    return tuple(found[:tokens])


def first_piece(tokens: tuple[str, ...]) -> tuple[int, str]:
    """The token with which a stream can first be judged, and the text that is judged then."""
    flow = Flow(())
    for number, token in enumerate(tokens):
        flow.add("text", "text", token)
        end = flow.due()
        if end is not None:
            return number, "".join(tokens)[:end]
    return len(tokens) - 1, "".join(tokens)


def prompt(number: int) -> str:
    """What the user of a stream asks."""
    return f"Please tell me a little about daily life in a small town, as in case {number} of mine."


def request(number: int) -> bytes:
    """The request of a stream."""
    messages = [{"role": "user", "content": prompt(number)}]
    return measure.request(
        "/v1/chat/completions", {"model": _MODEL, "messages": messages, "stream": True}
    )


# --- The upstream ------------------------------------------------------------------------------
@dataclass(slots=True)
class Spoken:
    """What the upstream said in one stream, and when it had sent each token."""

    tokens: tuple[str, ...]
    interval: float
    times: list[float] = field(default_factory=list)
    is_over: bool = False
    """Whether nothing more comes: it said all, or was left."""

    @property
    def ended_at(self) -> float:
        """When the last was sent."""
        return self.times[-1]

    @property
    def late(self) -> float:
        """Seconds by which the upstream itself was slow: the fault of the load, not the service."""
        return self.times[-1] - self.times[0] - self.interval * (len(self.times) - 1)


class Talker:
    """The upstream. ``tokens`` gives what stream so and so says; with no ``interval`` all at once.

    ``said`` holds each stream until it is taken.
    """

    def __init__(
        self, tokens: Callable[[int], tuple[str, ...]], interval: float = 1 / RATE
    ) -> None:
        self.tokens = tokens
        self.interval = interval
        self.said: dict[int, Spoken] = {}
        self.sent = 0
        """Tokens."""
        self.port = 0
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listens on a free port."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Speech(self), "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Listens no more."""
        if self._server is not None:
            self._server.close()


class _Speech(asyncio.Protocol):
    """One connection to the upstream."""

    def __init__(self, talker: Talker) -> None:
        self._talker = talker
        self._loop = asyncio.get_running_loop()
        self._buffer = b""
        self._timer: asyncio.TimerHandle | None = None
        self._spoken: Spoken | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._spoken is not None:
            self._spoken.is_over = True

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n") + 4
        if end < 4:
            return
        length = _LENGTH.search(self._buffer, 0, end)
        body = self._buffer[end:]
        if len(body) < (int(length[1]) if length else 0):
            return
        self._buffer = b""
        number = _NUMBER.search(body)
        if number is None:
            self._transport.write(_MODELS % len(MODELS) + MODELS)
            return
        tokens = self._talker.tokens(int(number[1]))
        self._spoken = Spoken(tokens, self._talker.interval)
        self._talker.said[int(number[1])] = self._spoken
        completion = Completion((Choice(tokens),), model=_MODEL, completion_tokens=len(tokens))
        framed = [b"%x\r\n%s\r\n" % (len(one), one) for one in events(completion, usage=False)]
        said, rest = framed[1 : len(tokens) + 1], [*framed[len(tokens) + 1 :], _END]
        said[0] = _HEAD + framed[0] + said[0]
        said[-1] += b"".join(rest)
        if not self._spoken.interval:
            said = [b"".join(said)]
        self._begun_at = self._loop.time()
        self._say(iter(said), 0, self._spoken)

    def _say(self, parts: Iterator[bytes], number: int, spoken: Spoken) -> None:
        part = next(parts, None)
        if part is None:
            spoken.is_over = True
            return
        self._transport.write(part)
        spoken.times.append(time.perf_counter())
        self._talker.sent += 1 if spoken.interval else len(spoken.tokens)
        due = self._begun_at + (number + 1) * spoken.interval
        self._timer = self._loop.call_at(due, self._say, parts, number + 1, spoken)


# --- The clients -------------------------------------------------------------------------------
@dataclass(slots=True)
class Heard:
    """What a client got of one stream, and when (its first text, its last byte)."""

    sent_at: float
    body: bytearray = field(default_factory=bytearray)
    first_text_at: float | None = None
    last_at: float = 0.0
    is_whole: bool = False
    """Whether the answer came to its end, as HTTP has it."""

    def pieces(self) -> list[str]:
        """The text of each event that has any, in the order of their coming."""
        found = []
        for line in bytes(self.body).splitlines():
            if line.startswith(b"data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    found.append(choice["delta"].get("content") or "")
        return [one for one in found if one]

    @property
    def ended(self) -> bool:
        """Whether it ended as a whole answer does."""
        body = bytes(self.body)
        return (
            self.is_whole
            and b'"finish_reason":"stop"' in body
            and body.endswith(b"data: [DONE]\n\n")
        )


class Client:
    """Asks for one stream after the other, over one connection for as long as that is kept."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connection: _Listening | None = None

    async def stream(self, number: int, *, leaves: bool = False) -> Heard:
        """A stream from its request to its end; a client that ``leaves`` does so at the first text.

        Anything but a 200 ends the benchmark.
        """
        if self._connection is None or self._connection.is_closed:
            loop = asyncio.get_running_loop()
            _, self._connection = await loop.create_connection(_Listening, "127.0.0.1", self._port)
        return await self._connection.ask(request(number), leaves)

    def close(self) -> None:
        """Goes away, also in the middle of an answer."""
        if self._connection is not None:
            self._connection.leave()


class _Listening(asyncio.Protocol):
    """One connection of a client. Reads chunked bodies."""

    def __init__(self) -> None:
        self.is_closed = False
        self._buffer = bytearray()
        self._in_body = False
        self._leaves = False
        self._heard = Heard(0.0)
        self._done: asyncio.Future[Heard] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_closed = True
        self._end()

    def ask(self, asked: bytes, leaves: bool) -> asyncio.Future[Heard]:
        self._buffer.clear()
        self._in_body, self._leaves = False, leaves
        self._heard = Heard(time.perf_counter())
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(asked)
        return self._done

    def data_received(self, data: bytes) -> None:
        heard, buffer = self._heard, self._buffer
        heard.last_at = time.perf_counter()
        buffer += data
        if not self._in_body:
            end = buffer.find(b"\r\n\r\n") + 4
            if end < 4:
                return
            if b" 200 " not in buffer[:16] or b"chunked" not in buffer[:end].lower():
                self._fail(f"a stream was answered with {bytes(buffer[:1000])!r}")
                return
            del buffer[:end]
            self._in_body = True
        start, is_last = 0, False
        while not is_last and (end := buffer.find(b"\r\n", start)) >= 0:
            size = int(buffer[start:end], 16)
            if len(buffer) < end + size + 4:
                break
            heard.body += buffer[end + 2 : end + 2 + size]
            start, is_last = end + size + 4, not size
        del buffer[:start]
        if heard.first_text_at is None and _TEXT.search(heard.body):
            heard.first_text_at = heard.last_at
            if self._leaves:
                self.leave()
        if is_last:
            heard.is_whole = True
            self._end()

    def leave(self) -> None:
        self.is_closed = True
        self._end()
        self._transport.abort()

    def _end(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(self._heard)

    def _fail(self, reason: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(RuntimeError(reason))
        self._transport.abort()


numbers: Final = itertools.count(1)
"""Of streams: each that is asked for takes the next."""
