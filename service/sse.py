"""Server-sent events: bytes in and events out, and the reverse. No I/O.

The format is the event stream of the HTML Standard, section 9.2
(https://html.spec.whatwg.org/multipage/server-sent-events.html).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from service.errors import UpstreamMalformed

DONE = b"data: [DONE]\n\n"
"""The event that ends a stream in OpenAI's dialect."""

_DATA = b"data: "
_BOM = b"\xef\xbb\xbf"
_CONTENT = re.compile(rb"[^\r\n]")
# A line end and then a blank line. A CR may be the first half of a CRLF, so the first line end
# counts only once the byte after it is known. The second counts at once, or the last event of a
# stream would wait for a byte that never comes; its LF, if one follows, opens the next event.
_EVENT_END = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n?|\n)")
_LONGEST_EVENT_END = 4
_LINE_END = re.compile(r"\r\n|\r|\n")


class Event(NamedTuple):
    """One event as it came.

    ``event`` is its type, or None where it has none. ``data`` is its data lines, joined by line
    feeds; a block of comments alone has none and gives the empty string. ``raw`` is every byte of
    it, with the lines that parsers ignore and the blank line that ends it.
    """

    event: str | None
    data: str
    raw: bytes


class EventParser:
    """Cuts a stream of bytes into events, however the reads cut it.

    The ``raw`` of all events together are the bytes that were fed. Raises UpstreamMalformed for
    an event over ``max_event_bytes`` and for bytes that are not UTF-8.
    """

    def __init__(self, max_event_bytes: int = 1 << 20) -> None:
        self._max_event_bytes = max_event_bytes
        self._buffer = bytearray()
        self._searched = 0
        self._at_start = True
        self._has_returns = False
        """Whether a CR ever came: without one, a blank line is two line feeds."""

    def feed(self, data: bytes) -> list[Event]:
        """The events that ``data`` completes, in order."""
        buffer = self._buffer
        buffer += data
        self._has_returns = self._has_returns or b"\r" in data
        events = []
        start = 0
        searched = self._searched
        while True:
            # Blank lines before an event end nothing; they stand at the head of its raw bytes.
            content = _CONTENT.search(buffer, searched)
            if content is None:
                break
            if not self._has_returns:
                end = buffer.find(b"\n\n", content.end()) + 2
                if end < 2:
                    break
                searched = end
            else:
                match = _EVENT_END.search(buffer, content.end())
                if match is None:
                    break
                searched = match.end()
            events.append(self._event(bytes(buffer[start:searched])))
            start = searched
        del buffer[:start]
        self._check_size(len(buffer))
        # What was searched is not searched again, or many small reads would cost their square.
        self._searched = max(0, len(buffer) - _LONGEST_EVENT_END + 1)
        return events

    def finish(self) -> list[Event]:
        """What is left when the stream has ended: nothing, or one event without its blank line.

        The standard drops such an event, but some clients read it, so it is to be judged.
        """
        raw = bytes(self._buffer)
        self._buffer.clear()
        self._searched = 0
        return [self._event(raw)] if raw else []

    def _event(self, raw: bytes) -> Event:
        self._check_size(len(raw))
        content = raw
        if self._at_start:
            self._at_start = False
            content = raw.removeprefix(_BOM)
        if is_one_line(content):
            try:
                return Event(None, content[len(_DATA) : -2].decode(), raw)
            except UnicodeDecodeError:
                raise self._no_text() from None
        try:
            # bytes.splitlines knows CR, LF and CRLF alone; str.splitlines knows seven more.
            lines = [line.decode() for line in content.splitlines()]
        except UnicodeDecodeError:
            # From None: the foreign error holds the bytes.
            raise self._no_text() from None
        event = None
        data = []
        for line in lines:
            field, _, value = line.partition(":")
            if field == "data":
                data.append(value.removeprefix(" "))
            elif field == "event":
                event = value.removeprefix(" ")
        return Event(event or None, "\n".join(data), raw)

    @staticmethod
    def _no_text() -> UpstreamMalformed:
        return UpstreamMalformed("The upstream's event stream is not UTF-8.")

    def _check_size(self, size: int) -> None:
        if size > self._max_event_bytes:
            raise UpstreamMalformed(
                "The upstream sent an event that is too large: the limit is "
                f"{self._max_event_bytes} bytes.",
                code="upstream_too_large",
            )


def is_one_line(raw: bytes) -> bool:
    """Whether an event is one line of data and the blank line, as nearly all are."""
    return (
        raw.startswith(_DATA) and raw.find(b"\n") == len(raw) - 2 and raw.endswith(b"\n\n")
    ) and b"\r" not in raw


def encode(data: str, event: str | None = None) -> bytes:
    """One event as bytes; ``event`` is its type, a single line."""
    head = f"event: {event}\n" if event else ""
    lines = "".join(f"data: {line}\n" for line in _LINE_END.split(data))
    return f"{head}{lines}\n".encode()


def comment(text: str) -> bytes:
    """A comment: clients ignore it, and it keeps a silent connection open."""
    lines = "".join(f": {line}\n" for line in _LINE_END.split(text))
    return f"{lines}\n".encode()
