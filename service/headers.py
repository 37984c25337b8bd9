"""Which headers pass, from the client to the upstream and back; pure."""

from __future__ import annotations

from collections.abc import Iterable

Headers = tuple[tuple[str, str], ...]
"""Headers in the order in which they came, repeated ones too; names are lower case."""

# RFC 9110, section 7.6.1: these speak of one connection, and so does what `connection` names.
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
_REQUEST_NAMES = frozenset(
    {
        "accept",
        "authorization",
        "baggage",
        "content-type",
        "endpoint-load-metrics-format",  # vLLM's: asks for the header below
        "idempotency-key",
        "traceparent",
        "tracestate",
        "user-agent",
    }
)
_REQUEST_PREFIXES = ("anthropic-", "openai-", "x-")
# Where a request came from is ours to say, and how it is read is not the client's to change.
_REQUEST_NOT = (
    "x-forwarded",
    "x-http-method",
    "x-original-",
    "x-real-ip",
    "x-rewrite-",
    "x-sluicegate-",
)
_RESPONSE_NAMES = frozenset(
    {
        "cache-control",
        "content-language",
        "content-type",
        "endpoint-load-metrics",
        "request-id",
        "retry-after",
        "retry-after-ms",
        "www-authenticate",
    }
)
_RESPONSE_PREFIXES = ("anthropic-", "openai-", "ratelimit", "x-")
_RESPONSE_NOT = ("x-sluicegate-",)


def request_headers(client_headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The headers of a client's request that go to the upstream.

    Takes pairs with lower-case names, as ASGI has them. A list of what may pass, so that nothing
    passes by oversight: never hop-by-hop headers, `host`, `content-length`, `accept-encoding`,
    cookies, `forwarded` and the like, or our own. Repeated ones are joined (RFC 9110, section
    5.3). A value with anything but printable ASCII is left out: its bytes would not stay the same.
    """
    kept: dict[str, str] = {}
    for name, value in _end_to_end(client_headers):
        if (
            name in _REQUEST_NAMES
            or (name.startswith(_REQUEST_PREFIXES) and not name.startswith(_REQUEST_NOT))
        ) and (value.isascii() and value.isprintable()):
            kept[name] = f"{kept[name]}, {value}" if name in kept else value
    return kept


def response_headers(upstream_headers: Iterable[tuple[str, str]]) -> Headers:
    """The headers of an upstream's answer that go to the client, in their order.

    A list of what may pass, like ``request_headers``: never hop-by-hop headers, those of the
    body's length and coding (ours are computed), `set-cookie`, `server`, `date` or `location`.
    """
    return tuple(
        (name, value)
        for name, value in _end_to_end(upstream_headers)
        if name in _RESPONSE_NAMES
        or (name.startswith(_RESPONSE_PREFIXES) and not name.startswith(_RESPONSE_NOT))
    )


def header(headers: Iterable[tuple[str, str]], name: str) -> str | None:
    """The first value of a header, or None; ``name`` is lower case."""
    return next((value for key, value in headers if key == name), None)


def _end_to_end(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    pairs = list(headers)
    dropped: set[str] = set()
    for name, value in pairs:
        if name == "connection":
            dropped.update(option.strip().lower() for option in value.split(","))
    return [pair for pair in pairs if pair[0] not in _HOP_BY_HOP and pair[0] not in dropped]
