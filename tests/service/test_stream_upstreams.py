"""Bad upstreams and clients that leave, before a real server, in every dialect that streams.

Whatever an upstream does, a stream ends in bounded time with the dialect's own error, and what was
not judged is not in it.
"""

import json
import socket
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import pytest

from service import streaming
from tests.fake_upstream import Answer, compact
from tests.service.conftest import Server, StartServer
from tests.service.rig import BAD, GRAVE, REFUSAL
from tests.service.test_anthropic_sdk import message
from tests.service.test_responses import response, said
from tests.service.wires import (
    LONG,
    POLICY,
    WIRES,
    Streamed,
    Streams,
    Wire,
    data,
    data_of,
    text_of,
)

UNJUDGED = "and severe-violence "
"""Comes behind the last sentence that is judged: a guard that saw it would not let it pass."""


def assert_ends_with_error(wire: Wire, status: int, raw: bytes, code: str) -> None:
    """The dialect's own error: as an answer, or as the last event of a stream."""
    if status != 200:
        assert status in (502, 504)
        body = json.loads(raw)
    else:
        shown = data_of(raw)
        if wire.name in ("chat", "completions"):
            assert shown.pop() == "[DONE]"
            assert shown.count("[DONE]") == 0
        else:
            assert raw.rpartition(b"event: ")[2].startswith(b"error\n")
        body = json.loads(shown[-1])
    if wire.name == "messages":
        assert (body["type"], body["error"]["type"]) == ("error", "api_error")
    elif wire.name == "responses" and status == 200:
        assert body["type"] == "error"
        body = {"error": body}
    assert body["error"]["code"] == code
    assert "severe" not in body["error"]["message"]


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    return start_server(
        policy=POLICY,
        upstream=Streams(),
        upstream_idle_seconds=1.0,
        upstream_failures=10_000,
        upstream_body_bytes=1 << 18,
    )


@pytest.fixture
def upstream(server: Server) -> Streams:
    assert isinstance(server.upstream, Streams)
    server.run(server.upstream.forget())
    return server.upstream


@pytest.fixture(scope="module")
def client(server: Server) -> httpx.Client:
    return server.client()


@pytest.fixture(params=list(WIRES))
def wire(request: pytest.FixtureRequest) -> Wire:
    return WIRES[request.param]


def read(server: Server, client: httpx.Client, wire: Wire) -> tuple[int, bytes]:
    """The whole answer to a request for a stream; once text comes, the upstream may go on."""
    fake = server.upstream
    assert isinstance(fake, Streams)
    raw = b""
    with client.stream("POST", wire.path, json={**wire.request, "stream": True}) as answer:
        for piece in answer.iter_raw():
            raw += piece
            if b"The w" in raw:
                server.loop.call_soon_threadsafe(fake.goes_on.set)
    return answer.status_code, raw


ROLE = {
    "chat": data({"id": "c1", "choices": [{"index": 0, "delta": {}, "finish_reason": None}]}),
    "completions": data({"id": "c1", "choices": [{"index": 0, "text": ""}]}),
    "messages": b'event: ping\ndata: {"type": "ping"}\n\n',
    "responses": data({"type": "response.in_progress", "response": response(status="queued")}),
}
"""An event that says nothing."""


def two_ends(wire: Wire, text: str) -> list[bytes]:
    """What ends a stream of this text, and its last event again."""
    every = wire.events(text)
    return [*every[len(wire.growing(text)) :], every[-1]]


_LAST_PIECES = 5
"""Of a text, so many hold all of ``UNJUDGED``."""
FAULTS: Mapping[str, tuple[Callable[[Wire, str], list[bytes]], Any, str]] = {
    "it stalls": (lambda wire, text: [], "stall", "upstream_timeout"),
    "no end": (lambda wire, text: [], "end", "upstream_malformed"),
    "two ends": (two_ends, "end", "upstream_malformed"),
    "an error": (lambda wire, text: [wire.error], "end", "upstream_malformed"),
    "garbage": (lambda wire, text: [b"data: {severe-violence\n\n"], "end", "upstream_malformed"),
    "not UTF-8": (lambda wire, text: [b"data: \xff\xfe\n\n"], "end", "upstream_malformed"),
    "a reset": (lambda wire, text: [], "reset", "upstream_malformed"),
    "a large event": (
        lambda wire, text: [
            wire.growing("hello")[-1].replace(b"hello", b"severe-violence " * 655_360)
        ],
        "end",
        "upstream_too_large",
    ),
    "events without words": (
        lambda wire, text: [ROLE[wire.name] * 8],
        "flood",
        "upstream_too_large",
    ),
    "comments": (lambda wire, text: [b": severe-violence\n\n" * 64], "flood", "upstream_too_large"),
}


# Before any text, only the body of the error is the dialect's own. What has an end is judged then,
# and shown, before another can come.
BEFORE_TEXT = [("chat", fault) for fault in FAULTS if fault != "two ends"] + [
    (name, "an error") for name in WIRES if name != "chat"
]
CASES = [(name, fault, True) for name in WIRES for fault in FAULTS] + [
    (*case, False) for case in BEFORE_TEXT
]


@pytest.mark.parametrize(
    ("name", "fault", "begins"),
    CASES,
    ids=[f"{name}-{fault}-{'after' if begins else 'before'} text" for name, fault, begins in CASES],
)
def test_a_bad_upstream_ends_a_stream_with_an_error(
    server: Server, client: httpx.Client, upstream: Streams, name: str, fault: str, begins: bool
) -> None:
    wire = WIRES[name]
    events, then, code = FAULTS[fault]
    # At its end a choice is judged, whatever comes behind it: only harmless text is there to see.
    unjudged = UNJUDGED.replace("severe", "no") if fault == "two ends" else UNJUDGED
    text = LONG + unjudged if begins else unjudged
    parts: list[bytes | None] = [*wire.growing(text)]
    if begins:
        parts[:-_LAST_PIECES] = [b"".join(wire.growing(text)[:-_LAST_PIECES]), None]
    # A reset may throw away what was written just before it: a moment for it to be read.
    upstream.answers = [Streamed(parts=(*parts, *events(wire, text)), then=then, pause=0.01)]
    status, raw = read(server, client, wire)
    assert (status == 200) == begins
    assert_ends_with_error(wire, status, raw, code)
    assert b"severe" not in raw
    shown = text_of(wire, raw) if begins else ""
    assert text.startswith(shown) if fault == "two ends" else LONG.startswith(shown)
    assert bool(shown) == begins


def test_a_stream_that_is_one_flood_of_text_ends(
    server: Server, client: httpx.Client, upstream: Streams, wire: Wire
) -> None:
    every = wire.growing(LONG)
    upstream.answers = [Streamed(parts=(b"".join(every[:-1]), every[-1]), then="flood")]
    status, raw = read(server, client, wire)
    assert_ends_with_error(wire, status, raw, "upstream_too_large")
    assert len(raw) < 1 << 20


def test_after_a_sign_of_life_a_failure_comes_as_an_event(
    server: Server,
    client: httpx.Client,
    upstream: Streams,
    wire: Wire,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_SECONDS", 0.05)
    upstream.answers = [Streamed(parts=(*wire.growing(UNJUDGED), wire.error), delay=0.4)]
    status, raw = read(server, client, wire)
    assert status == 200
    assert raw.startswith(b"event: ping\n" if wire.name == "messages" else b": ")
    assert_ends_with_error(wire, status, raw, "upstream_malformed")
    assert b"severe" not in raw


def test_an_answer_that_is_no_stream_is_judged_and_streamed(
    server: Server, client: httpx.Client, upstream: Streams, wire: Wire
) -> None:
    bodies: dict[str, Callable[[str], dict[str, Any]]] = {
        "chat": lambda text: {"choices": [
            {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        ]},
        "completions": lambda text: {
            "choices": [{"index": 0, "text": text, "finish_reason": "stop"}]
        },
        "messages": lambda text: message({"type": "text", "text": text}),
        "responses": lambda text: response(said(text)),
    }  # fmt: skip
    answer = bodies[wire.name]
    upstream.answers = [
        Answer(body=compact({"id": "x", "created": 1, "model": "m", **answer(text)}))
        for text in (BAD, LONG)
    ]
    status, raw = read(server, client, wire)
    assert (status, text_of(wire, raw)) == (200, LONG)
    assert b"insulting" not in raw
    assert len(upstream.received) == 2


def test_a_failure_of_another_attempt_is_a_refusal(
    server: Server, client: httpx.Client, upstream: Streams, wire: Wire
) -> None:
    bad = Streamed(parts=tuple(wire.events(BAD)))
    upstream.answers = [bad, Streamed(parts=tuple(wire.growing(UNJUDGED)), then="reset")]
    status, raw = read(server, client, wire)
    assert (status, text_of(wire, raw)) == (200, REFUSAL)
    assert b"severe" not in raw


# --- Clients that go away ----------------------------------------------------------------------
def scenes(wire: Wire) -> dict[str, list[Answer]]:
    """Where a client may leave: what the upstream was doing then."""
    bad = Streamed(parts=tuple(wire.events(BAD)))
    silent = Streamed(then="stall")
    return {
        "text was sent": [Streamed(parts=tuple(wire.growing(LONG)), then="stall")],
        "nothing had come": [silent],
        "it was all held": [Streamed(parts=tuple(wire.growing(GRAVE[:6])), then="stall")],
        "it was generated again": [bad, silent],
    }


@pytest.fixture(scope="module")
def patient(start_server: StartServer) -> Server:
    """A server that would wait for its upstream for longer than any test."""
    return start_server(policy=POLICY, upstream=Streams())


@pytest.mark.parametrize("scene", scenes(WIRES["chat"]))
def test_a_client_that_leaves_stops_the_upstream(patient: Server, wire: Wire, scene: str) -> None:
    fake = patient.upstream
    assert isinstance(fake, Streams)
    patient.run(fake.forget())
    answers = scenes(wire)[scene]
    fake.answers = [*answers]
    host, port = patient.url.removeprefix("http://").split(":")
    body = compact({**wire.request, "stream": True})
    head = f"POST {wire.path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as client:
        client.sendall(head.encode() + body)
        assert fake.stalls.wait(20)
        if scene == "text was sent":
            seen = b""
            while b"The w" not in seen:
                piece = client.recv(65536)
                assert piece
                seen += piece
    patient.run(fake.wait_for_disconnect())
    assert len(fake.received) == len(answers)
