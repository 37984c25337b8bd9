"""Request bodies: bytes to JSON, refusing what two parsers may read differently."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any, Final, NoReturn

from service.errors import BadRequest, TooLarge

Message = MutableMapping[str, Any]


class ClientDisconnected(Exception):
    """The client went away; nobody reads what would be answered."""


async def read_body(receive: Callable[[], Awaitable[Message]], limit: int) -> bytes:
    """All bytes of the body. Counts what arrives, whatever the headers say.

    Raises ``TooLarge`` beyond ``limit`` bytes, ``ClientDisconnected`` if the client leaves.
    """
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise TooLarge(
                f"the body is over {limit} bytes: send less at once, or raise body_bytes",
                code="body_too_large",
            )
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in ``raw``.

    Refused with ``BadRequest``: bytes that are not UTF-8, malformed JSON, a key that stands twice
    in one object (in whatever case), NaN, infinities and numbers that would become one, strings
    that are not text (lone surrogates, NUL), nesting that overflows the parser, and anything but
    an object.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(
            f"the body is not UTF-8 (byte {error.start}): encode it as UTF-8", code="invalid_utf8"
        ) from None
    if text.startswith("\ufeff"):
        raise BadRequest(
            "the body begins with a byte order mark: leave it out", code="invalid_json"
        )
    try:
        value = _decode(text)
    except json.JSONDecodeError as error:
        raise BadRequest(
            f"the body is not JSON: {error.msg.lower().removesuffix(' at')} at line {error.lineno},"
            f" column {error.colno}",
            code="invalid_json",
        ) from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply", code="invalid_json") from None
    except ValueError:
        # An integer of more digits than Python converts.
        raise BadRequest("the body holds a number that is too long", code="invalid_json") from None
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object", code="invalid_json")
    # Only an escape can bring either in, so that most bodies need no second look.
    if b"\\u0000" in raw or b"\\ud" in raw or b"\\uD" in raw:
        _refuse_what_is_not_text(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    # Some parsers take keys that differ in case for the same.
    if len(result) != len(pairs) or (
        not _is_plain("".join(result)) and len({key.casefold() for key in result}) != len(pairs)
    ):
        raise BadRequest(
            "a key stands twice in one object of the body, as it is or in another case: send each"
            " key once",
            code="duplicate_key",
        )
    return result


def _is_plain(text: str) -> bool:
    """Whether no two different parts of ``text`` are the same in another case."""
    return text.isascii() and text == text.lower()


def _no_constant(name: str) -> NoReturn:
    raise BadRequest(f"the body holds {name}, which is not JSON", code="invalid_json")


def _finite(digits: str) -> float:
    # JSON has no infinity, but 1e400 would become one here, and be written on as one.
    value = float(digits)
    if math.isinf(value):
        raise BadRequest("the body holds a number that is too large", code="invalid_json")
    return value


_decode: Final = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
).decode
_encode: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _refuse_what_is_not_text(value: Any) -> None:
    for string in strings(value):
        if "\x00" in string:
            raise BadRequest("a string holds the NUL character: remove it", code="invalid_text")
        if not string.isascii():
            try:
                string.encode("utf-8")
            except UnicodeEncodeError:
                raise BadRequest(
                    "a string holds half of a surrogate pair: send whole characters",
                    code="invalid_text",
                ) from None


def strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value, keys of objects included, in order."""
    # A stack rather than recursion: the parser bounds depth, but not below our own limit.
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            for key in reversed(item):
                stack += (item[key], key)
        elif isinstance(item, list):
            stack.extend(reversed(item))


def dumps(value: Any) -> str:
    """Compact JSON in UTF-8's own characters."""
    return _encode(value)
