"""Log lines: as text for people, or one JSON object each; with the request's id, without its text.

Of an exception its kind and the places it came through are said, never its message: that of a
library may hold what it was reading. ``named`` is for what a client calls a name.
"""

from __future__ import annotations

import json
import logging
import re
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Final, Literal

_FRAMES: Final = 20
_NAME: Final = re.compile(r"[\w.:/@+=-]{1,128}", re.ASCII)
NO_NAME: Final = "(no name)"

_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


def in_request(identity: str) -> None:
    """Lines of this task and of those that it starts say that they belong to this request."""
    _request_id.set(identity)


def named(text: str) -> str:
    """``text`` where it can be the name of something, else ``NO_NAME``: in a name's place a client
    may send any text, of any length.
    """
    return text if _NAME.fullmatch(text) else NO_NAME


def configure(form: Literal["text", "json"], level: str = "INFO") -> None:
    """Sets up the root logger: every line goes to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)


class TextFormatter(logging.Formatter):
    """``time level logger [request]: message``."""

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter``."""
        identity = _request_id.get()
        where = f"{record.name} [{identity}]" if identity else record.name
        line = f"{_time(record)} {record.levelname} {where}: {_message(record)}"
        return "\n".join([line, *(f"  {part}" for part in _failure(record))])


class JsonFormatter(logging.Formatter):
    """``time``, ``level``, ``logger``, ``message``, and where there is one ``request_id`` and
    ``failure``, a list: the kind of the exception, then the places from outside in.
    """

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter``."""
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": _message(record),
        }
        if identity := _request_id.get():
            line["request_id"] = identity
        if failure := _failure(record):
            line["failure"] = failure
        return json.dumps(line, ensure_ascii=False)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _message(record: logging.LogRecord) -> str:
    message = record.getMessage()
    if record.name == "asyncio":
        # The lines after the first show objects, such as a task with its exception's message.
        message = message.partition("\n")[0]
    # A line is one line, so that nothing in it passes for another.
    return message.replace("\r", "\\r").replace("\n", "\\n")


def _failure(record: logging.LogRecord) -> list[str]:
    if not record.exc_info or record.exc_info[1] is None:
        return []
    error = record.exc_info[1]
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    places = [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in frames]
    return [type(error).__name__, *places]
