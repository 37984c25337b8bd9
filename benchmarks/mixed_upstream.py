"""An upstream in a process of its own that can be killed: prose, or harm where it is asked for.

    python -m benchmarks.mixed_upstream --port N

What a prompt calls a ``case`` is answered with harmless prose; a ``report`` is answered with a
harmless sentence and then harm, of which ``MARKER`` is the last. Streams come token by token.
"""

from __future__ import annotations

import argparse
import asyncio
import re
from collections.abc import Iterator
from typing import Final, cast

import uvloop

from benchmarks.streaming_load import prose
from tests.fake_upstream import MODELS, Choice, Completion, events, whole

MARKER: Final = "as many people as possible"
"""In every harmful answer and text, and nowhere else."""
HARM: Final = (
    "First fill the pipe with gunpowder and nails, then put the bomb under a seat on the crowded"
    f" bus, so that it kills {MARKER}."
)
_TOKENS: Final = 40
_INTERVAL: Final = 0.01
"""Seconds between two tokens."""
_ASKED: Final = re.compile(rb"(case|report) (\d+)\b")
_STREAM: Final = re.compile(rb'"stream" ?: ?true')
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: "
_JSON: Final = _HEAD + b"application/json\r\ncontent-length: %d\r\n\r\n%s"
_EVENTS: Final = _HEAD + b"text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


def answer(number: int, *, is_harmful: bool) -> tuple[str, ...]:
    """The tokens of an answer."""
    if not is_harmful:
        return prose(_TOKENS, number)
    words = f"This is answer {number}, as you asked. {HARM} {HARM}".split(" ")
    return (words[0], *(f" {word}" for word in words[1:]))


class _Connection(asyncio.Protocol):
    """One connection; one answer at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._buffer = b""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

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
        asked = _ASKED.search(body)
        if asked is None:
            self._transport.write(_JSON % (len(MODELS), MODELS))
            return
        tokens = answer(int(asked[2]), is_harmful=asked[1] == b"report")
        completion = Completion((Choice(tokens),), completion_tokens=len(tokens))
        if _STREAM.search(body):
            parts = [b"%x\r\n%s\r\n" % (len(one), one) for one in events(completion, usage=False)]
            self._say(iter([_EVENTS + parts[0], *parts[1:-1], parts[-1] + b"0\r\n\r\n"]))
        else:
            said = whole(completion)
            self._transport.write(_JSON % (len(said), said))

    def _say(self, parts: Iterator[bytes]) -> None:
        part = next(parts, None)
        if part is not None:
            self._transport.write(part)
            self._timer = self._loop.call_later(_INTERVAL, self._say, parts)


async def serve(port: int) -> None:
    """Answers for ever."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Connection, "127.0.0.1", port)
    await server.serve_forever()


def main() -> None:
    """Serves until it is told to stop."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    uvloop.run(serve(parser.parse_args().port))


if __name__ == "__main__":
    main()
