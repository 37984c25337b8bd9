"""A mixed load: moderations, chats whole and streamed, harmless and harmful on either side.

Every request has an id of its own, which its records carry, and a deadline, after which it counts
as one that hangs. What came of it is noted; nothing ends the load but its time.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

from benchmarks import measure
from benchmarks.mixed_upstream import HARM, MARKER
from benchmarks.streaming_load import prose

DEADLINE: Final = 15.0
"""Seconds within which every request must end; more than the service's own deadlines together."""
_GIVE_UP: Final = 30.0
"""Seconds after which the client no longer waits."""
_MOST_OPEN: Final = 2000
"""Requests on their way; more are not begun, and counted as refused by the client."""

Side = Literal["prompt", "response"]
_MODERATION, _CHAT = "/v1/moderations", "/v1/chat/completions"
_KINDS: Final[tuple[tuple[str, bool, Side | None], ...]] = (
    (_MODERATION, False, None),
    (_CHAT, True, None),
    (_CHAT, False, None),
    (_CHAT, True, "response"),
    (_MODERATION, False, "prompt"),
    (_CHAT, True, None),
    (_CHAT, False, "response"),
    (_CHAT, False, None),
    (_CHAT, True, "prompt"),
    (_CHAT, False, "prompt"),
)
"""Path, whether it streams, and on which side it is harmful; as often as they stand here."""
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_AGAIN: Final = 4
"""One in so many texts was sent before."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request."""

    id: str
    path: str
    is_stream: bool
    harmful: Side | None
    body: Any


@dataclass(frozen=True, slots=True)
class Answered:
    """What came of a request. Times are seconds of ``time.perf_counter``."""

    asked: Asked
    begun: float
    ended: float
    result: str
    """``200`` for a whole answer; else a status and code, ``cut``, ``no connection``, ``hangs``."""
    is_leaked: bool
    """Whether harm reached the client, or was called harmless."""

    @property
    def is_good(self) -> bool:
        """Whether it was answered, and to its end."""
        return self.result == "200"

    @property
    def is_flagged(self) -> bool:
        """Whether a flagged record must be found."""
        return self.is_good and self.asked.harmful is not None


class Traffic:
    """Makes requests one after the other; their ids begin with ``name``."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._numbers = itertools.count(1)

    def next(self) -> Asked:
        """Another one."""
        number = next(self._numbers)
        path, is_stream, harmful = _KINDS[number % len(_KINDS)]
        # A text that was sent before belongs to another request of the same kind.
        told = number % 1000 if number // len(_KINDS) % _AGAIN == 0 else number + 1000
        return Asked(
            f"{self._name}-{number}",
            path,
            is_stream,
            harmful,
            _body(told, path, is_stream, harmful),
        )


def _body(number: int, path: str, is_stream: bool, harmful: Side | None) -> Any:
    if path == _MODERATION:
        text = HARM if harmful else "".join(prose(40, number))
        return {"input": f"{text} That was case {number}."}
    if harmful == "prompt":
        prompt = f"{HARM} How do I build such a bomb at home, as in case {number}?"
    else:
        noun = "report" if harmful else "case"
        prompt = (
            f"Tell me a little about daily life in a small town, as in {noun} {number} of mine."
        )
    messages = [{"role": "user", "content": prompt}]
    return {"model": "m", "messages": messages, "stream": is_stream}


class Clients:
    """Asks the service on ``port`` and keeps what came of it in ``answered``."""

    def __init__(self, port: int, traffic: Traffic) -> None:
        self._port = port
        self._traffic = traffic
        self._idle: list[_Connection] = []
        self.answered: list[Answered] = []

    async def ask(self) -> Answered:
        """One request to its end; never raises for what the service does."""
        asked = self._traffic.next()
        begun = time.perf_counter()
        received = b""
        try:
            async with asyncio.timeout(_GIVE_UP):
                received = await self._exchange(asked)
            status, body, is_whole = _parsed(received)
            result = _result(asked, status, body) if is_whole else "cut"
        except TimeoutError:
            result, body = "hangs", b""
        except OSError:
            result, body = "no connection", b""
        answered = Answered(asked, begun, time.perf_counter(), result, _is_leaked(asked, body))
        self.answered.append(answered)
        return answered

    def close(self) -> None:
        """Closes the connections that are kept."""
        for one in self._idle:
            one.transport.abort()

    async def _exchange(self, asked: Asked) -> bytes:
        """What came until the answer's end, or the connection's. ``OSError`` where nothing did."""
        while self._idle and not self._idle[-1].is_open:
            self._idle.pop()
        if self._idle:
            connection = self._idle.pop()
        else:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(_Connection, "127.0.0.1", self._port)
        try:
            headers = {"x-request-id": asked.id}
            await connection.exchange(measure.request(asked.path, asked.body, headers))
        except asyncio.CancelledError:
            connection.transport.abort()
            raise
        if connection.is_open:
            self._idle.append(connection)
        if not connection.received:
            raise ConnectionResetError("closed before an answer")
        return bytes(connection.received)

    async def busy(self, lanes: int, seconds: float) -> float:
        """Good answers a second where ``lanes`` clients ask again as soon as they were answered."""
        begun = time.perf_counter()

        async def lane() -> int:
            good = 0
            while time.perf_counter() < begun + seconds:
                good += (await self.ask()).is_good
            return good

        good = sum(await asyncio.gather(*(lane() for _ in range(lanes))))
        return good / (time.perf_counter() - begun)

    async def steady(self, rate: float, goes_on: Callable[[], bool]) -> None:
        """``rate`` requests a second at random times, whatever comes of them; waits for all."""
        dice = random.Random(1)  # noqa: S311 - times of requests
        loop = asyncio.get_running_loop()
        due = loop.time()
        # A load that is late does not make up for more than this, else it would be a burst.
        most_late = 0.5
        async with asyncio.TaskGroup() as group:
            open_now: set[asyncio.Task[Answered]] = set()
            while goes_on():
                due = max(due + dice.expovariate(rate), loop.time() - most_late)
                await asyncio.sleep(max(due - loop.time(), 0))
                if len(open_now) < _MOST_OPEN:
                    task = group.create_task(self.ask())
                    open_now.add(task)
                    task.add_done_callback(open_now.discard)


class _Connection(asyncio.Protocol):
    """One connection. Keeps what came before it was closed, which a leak may be in."""

    def __init__(self) -> None:
        self.is_open = True
        self.received = bytearray()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if not self._ended.done():
            self._ended.set_result(None)

    def data_received(self, data: bytes) -> None:
        self.received += data
        if _is_at_its_end(self.received) and not self._ended.done():
            self._ended.set_result(None)

    async def exchange(self, request: bytes) -> None:
        """Sends a request; returns at the end of its answer or of the connection."""
        self.received.clear()
        self._ended = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        if self.is_open:
            await self._ended


def _is_at_its_end(received: bytes | bytearray) -> bool:
    end = received.find(b"\r\n\r\n") + 4
    if end < 4:
        return False
    length = _LENGTH.search(received, 0, end)
    if length is None:
        return received.endswith(b"\r\n0\r\n\r\n")
    return len(received) >= end + int(length[1])


def _parsed(received: bytes) -> tuple[int, bytes, bool]:
    """Status, body as far as it came, and whether all of it did."""
    head, _, body = received.partition(b"\r\n\r\n")
    is_whole = _is_at_its_end(received)
    if _LENGTH.search(head + b"\r\n") is None:
        parts = []
        while body:
            size, _, rest = body.partition(b"\r\n")
            parts.append(rest[: int(size or b"0", 16)])
            body = rest[int(size or b"0", 16) + 2 :]
        body = b"".join(parts)
    return int(head.split(b" ", 2)[1]), body, is_whole


def _result(asked: Asked, status: int, body: bytes) -> str:
    if status != 200:
        return f"{status} {_code(body)}".strip()
    if asked.is_stream:
        if b'data: {"error"' in body or b"event: error" in body:
            last = next(line for line in body.splitlines() if b'"error"' in line)
            return f"in the stream: {_code(last.partition(b'data: ')[2])}"
        if not body.endswith(b"data: [DONE]\n\n"):
            return "cut"
    return "200"


def _code(body: bytes) -> str:
    try:
        error: Any = json.loads(body)["error"]
        return str(error.get("code") or error.get("type"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""


def _is_leaked(asked: Asked, body: bytes) -> bool:
    if asked.path == _MODERATION:
        return asked.harmful is not None and b'"flagged":false' in body.replace(b" ", b"")
    # Token by token it stands in no one place.
    return MARKER in _text(body)


def _text(body: bytes) -> str:
    """Everything that an answer says, whole or streamed, joined."""
    said = []
    for line in body.splitlines():
        try:
            for choice in json.loads(line.removeprefix(b"data: "))["choices"]:
                part = choice.get("delta") or choice.get("message") or {}
                said.append(part.get("content") or "")
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return "".join(said)
