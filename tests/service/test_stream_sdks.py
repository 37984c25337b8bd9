"""Streams through the clients that people use: OpenAI's, Anthropic's, LangChain's.

Each reads every way in which a stream may go, to its final object: the right end, and exactly the
text that was on the wire.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import anthropic
import openai
import pytest

from service import streaming
from tests.fake_upstream import Answer, Choice, Completion, ToolCall, pieces
from tests.fake_upstream import events as chat_events
from tests.service.clients import (
    SDKS,
    Clients,
    Reads,
    Seen,
    chat_call,
    chat_created,
    connected,
    final_of,
    langchain_call,
    message_call,
    message_streamed,
    response_call,
    turns,
)
from tests.service.conftest import Server, StartServer
from tests.service.rig import BAD, GRAVE, REFUSAL, SAFE
from tests.service.test_anthropic_sdk import call
from tests.service.test_responses import call as function_call
from tests.service.wires import (
    BAD_FIRST,
    CUT,
    LONG,
    POLICY,
    WIRES,
    Streamed,
    Streams,
    Wire,
    data,
    data_of,
    message_events,
    response_events,
    text_of,
    written,
)


@pytest.fixture(autouse=True, scope="module")
def untraced() -> Iterator[None]:
    """LangSmith would be told of every call, by whatever the developer's environment says."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2"):
            patch.setenv(name, "false")
        yield


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    return start_server(policy=POLICY, upstream=Streams())


@pytest.fixture(scope="module")
def clients(server: Server) -> Clients:
    return connected(server)


@pytest.fixture
def upstream(server: Server) -> Streams:
    assert isinstance(server.upstream, Streams)
    server.run(server.upstream.forget())
    return server.upstream


@pytest.fixture(scope="module")
def filtering(start_server: StartServer) -> tuple[Streams, Clients]:
    """Before a server whose refusals say that they are some."""
    policy = POLICY | {"refusal": {"finish_reason": "content_filter"}}
    upstream = Streams()
    return upstream, connected(start_server(policy=policy, upstream=upstream))


@pytest.fixture(scope="module")
def watching(start_server: StartServer) -> tuple[Streams, Clients, Server]:
    """Before a server that only watches."""
    upstream = Streams()
    server = start_server(policy=POLICY | {"stream": {"mode": "monitor"}}, upstream=upstream)
    return upstream, connected(server), server


@pytest.fixture(params=list(SDKS))
def sdk(request: pytest.FixtureRequest) -> tuple[Wire, Reads]:
    name, reads = SDKS[request.param]
    return WIRES[name], reads


@pytest.fixture(
    params=["openai chat create", "openai completions", "openai responses", "anthropic"]
)
def sdk_of_each_wire(request: pytest.FixtureRequest) -> tuple[Wire, Reads]:
    name, reads = SDKS[request.param]
    return WIRES[name], reads


@pytest.fixture
def signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server shows that it lives many times a second."""
    monkeypatch.setattr(streaming, "KEEP_ALIVE_SECONDS", 0.02)


def streams(wire: Wire, *texts: str, **changes: Any) -> list[Answer]:
    """A stream for each text."""
    return [written(wire.events(text), **changes) for text in texts]


# --- Every way in which a stream may go ---------------------------------------------------------
@pytest.mark.parametrize(
    ("says", "shown"),
    [
        ([LONG], LONG),
        ([BAD_FIRST, LONG], LONG),
        ([BAD_FIRST] * 3, REFUSAL),
        ([GRAVE], REFUSAL),
        ([CUT], None),
    ],
    ids=["safe", "generated again", "exhausted", "blocked", "cut"],
)
def test_a_stream_ends_as_it_should(
    clients: Clients, upstream: Streams, sdk: tuple[Wire, Reads], says: list[str], shown: str | None
) -> None:
    wire, reads = sdk
    upstream.answers = streams(wire, *says, pause=0.002)
    text, end = reads(clients, SAFE)
    raw = clients.tee.raw
    assert text == text_of(wire, raw)
    assert end == (wire.filtered if shown is None else wire.normal)
    if shown is None:
        assert len(text) > 50
        assert LONG.startswith(text)
    else:
        assert text == shown
    assert b"violence" not in raw
    assert b"insulting" not in raw
    assert len(upstream.received) == len(says)
    ends = {"chat": b"[DONE]", "completions": b"[DONE]", "messages": b'"message_stop"}'}
    if wire.name in ends:
        assert raw.count(ends[wire.name]) == 1


@pytest.mark.usefixtures("signs_of_life")
def test_signs_of_life_come_before_and_within_an_answer(
    clients: Clients, upstream: Streams, sdk: tuple[Wire, Reads]
) -> None:
    wire, reads = sdk
    upstream.answers = streams(wire, BAD_FIRST, LONG, delay=0.1, pause=0.05)
    assert reads(clients, SAFE) == (LONG, wire.normal)
    sign = b"event: ping" if wire.name == "messages" else b": waiting"
    before, _, within = clients.tee.raw.partition(b"The w")
    assert sign in before
    assert sign in within


@pytest.mark.usefixtures("signs_of_life")
def test_a_refusal_may_say_that_it_is_one(
    filtering: tuple[Streams, Clients], sdk: tuple[Wire, Reads]
) -> None:
    upstream, clients = filtering
    wire, reads = sdk
    upstream.answers = streams(wire, GRAVE, delay=0.1)
    assert reads(clients, SAFE) == (REFUSAL, wire.filtered)


def test_a_blocked_prompt_is_a_stream_too(
    clients: Clients, upstream: Streams, sdk: tuple[Wire, Reads]
) -> None:
    wire, reads = sdk
    upstream.answers = streams(wire, LONG, delay=60)
    assert reads(clients, GRAVE) == (REFUSAL, wire.normal)


def test_who_only_watches_keeps_nothing_back(watching: tuple[Streams, Clients, Server]) -> None:
    upstream, clients, server = watching
    wire = WIRES["chat"]
    # The upstream goes on only once the client has seen what is bad.
    begins = b"".join(wire.growing(f"{GRAVE}. "))
    upstream.answers = [Streamed(parts=(begins, None, *wire.events(LONG)[1:]))]
    shown = ""
    ends: list[str | None] = []
    for chunk in clients.openai.chat.completions.create(
        model="m", messages=turns(SAFE), stream=True
    ):
        shown += chunk.choices[0].delta.content or ""
        ends.append(chunk.choices[0].finish_reason)
        if GRAVE in shown:
            server.loop.call_soon_threadsafe(upstream.goes_on.set)
    assert (shown, ends[-1]) == (f"{GRAVE}. {LONG}", "stop")
    assert server.sample("released_before_verdict_characters_total") == len(shown)


# --- How bytes may come -------------------------------------------------------------------------
def beside(wire: Wire) -> bytes:
    """An event that speaks of no choice."""
    if wire.name == "messages":
        return b'event: ping\ndata: {"type": "ping"}\n\n'
    if wire.name == "responses":
        return b""
    kind = {"chat": "chat.completion.chunk", "completions": "text_completion"}[wire.name]
    return (
        b'data: {"id":"c1","object":"%s","created":7,"model":"m","choices":[]}\n\n' % kind.encode()
    )


SHAPES: dict[str, Callable[[Wire, list[bytes]], list[bytes]]] = {
    "in threes": lambda wire, events: [
        raw[n : n + 3] for raw in [b"".join(events)] for n in range(0, len(raw), 3)
    ],
    "CRLF": lambda wire, events: [event.replace(b"\n", b"\r\n") for event in events],
    "comments and ids": lambda wire, events: [
        b": severe-violence\n\nid: severe-violence\nretry: 1\n" + event for event in events
    ],
    "events beside": lambda wire, events: [
        events[0], *(event + beside(wire) for event in events[1:-2]), *events[-2:]
    ],
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_may_come_in_any_shape(
    clients: Clients, upstream: Streams, sdk_of_each_wire: tuple[Wire, Reads], shape: str
) -> None:
    wire, reads = sdk_of_each_wire
    text = "Grüße von den Höhen — 天气很好。 🌞 " * 2
    upstream.answers = [Streamed(parts=tuple(SHAPES[shape](wire, wire.events(text))))]
    assert reads(clients, SAFE) == (text, wire.normal)
    assert b"severe" not in clients.tee.raw


def test_a_line_may_be_long(
    clients: Clients, upstream: Streams, sdk_of_each_wire: tuple[Wire, Reads]
) -> None:
    wire, reads = sdk_of_each_wire
    text = LONG * 60
    events = [event.replace(b"hello", text.encode()) for event in wire.events("hello")]
    upstream.answers = [Streamed(parts=tuple(events))]
    assert reads(clients, SAFE) == (text, wire.normal)


# --- Tools, choices, usage ----------------------------------------------------------------------
def chat_tool(text: str) -> list[bytes]:
    called = ToolCall("Letter", json.dumps({"text": text}))
    return chat_events(
        Completion((Choice((), (called,), finish_reason="tool_calls"),)), usage=False
    )


def message_tool(text: str) -> list[bytes]:
    return message_events(call(text), "partial_json")


def response_tool(text: str) -> list[bytes]:
    item = function_call(json.dumps({"text": text}))
    return response_events(item, "response.function_call_arguments.delta")


@dataclass(frozen=True)
class Calls:
    """How an upstream streams a tool's call, what a client makes of it, and how it may end."""

    events: Callable[[str], list[bytes]]
    reads: Callable[[Clients], Seen]
    normal: str
    filtered: str


@pytest.mark.parametrize("says", [LONG, CUT], ids=["safe", "cut"])
@pytest.mark.parametrize(
    "calls",
    [
        Calls(chat_tool, chat_call, "tool_calls", "content_filter"),
        Calls(chat_tool, langchain_call, "tool_calls", "content_filter"),
        Calls(message_tool, message_call, "end_turn", "refusal"),
        Calls(response_tool, response_call, "completed", "incomplete"),
    ],
    ids=["openai chat", "langchain chat", "anthropic", "openai responses"],
)
def test_a_call_streams_and_a_bad_word_over_its_pieces_is_held(
    clients: Clients, upstream: Streams, calls: Calls, says: str
) -> None:
    upstream.answers = [written(calls.events(says))]
    arguments, end = calls.reads(clients)
    assert b"viole" not in clients.tee.raw
    if says == LONG:
        assert (json.loads(arguments), end) == ({"text": LONG}, calls.normal)
    else:
        assert end == calls.filtered
        assert 50 < len(arguments) < len(LONG) + 20
        begun = json.dumps({"text": CUT})
        assert "".join(begun.split()).startswith("".join(arguments.split()))


def test_a_short_bad_call_is_generated_again(clients: Clients, upstream: Streams) -> None:
    upstream.answers = [written(chat_tool(BAD)), written(chat_tool("hello"))]
    arguments, end = chat_call(clients)
    assert (json.loads(arguments), end) == ({"text": "hello"}, "tool_calls")
    assert len(upstream.received) == 2


DONE = b"data: [DONE]\n\n"
USAGE = data(
    {
        "id": "c1",
        "object": "chat.completion.chunk",
        "created": 7,
        "model": "m",
        "choices": [],
        "usage": {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12},
    }
)
WITH_USAGE: Any = {
    "model": "m",
    "messages": turns(SAFE),
    "stream_options": {"include_usage": True},
}


@pytest.mark.parametrize(
    ("bad", "again", "end"),
    [(BAD_FIRST, [LONG], "stop"), (CUT, [], "content_filter"), (GRAVE, [], "stop")],
    ids=["generated again", "cut", "refused"],
)
def test_of_three_choices_one_is_bad(
    clients: Clients, upstream: Streams, bad: str, again: list[str], end: str
) -> None:
    three = [
        [event.replace(b'"index":0', b'"index":%d' % n) for event in WIRES["chat"].events(text)]
        for n, text in enumerate((LONG, bad, LONG))
    ]
    upstream.answers = [
        written(
            [*(e for turn in zip_longest(*three) for e in turn if e and e != DONE), USAGE, DONE]
        ),
        *(written(WIRES["chat"].events(text)) for text in again),
    ]
    with clients.openai.chat.completions.stream(n=3, **WITH_USAGE) as stream:
        final = final_of(stream)
    first, second, third = final.choices
    for choice in (first, third):
        assert (choice.message.content, choice.finish_reason) == (LONG, "stop")
    assert second.finish_reason == end
    shown = second.message.content or ""
    if bad == CUT:
        assert shown
        assert LONG.startswith(shown)
    else:
        assert shown == (again[0] if again else REFUSAL)
    assert final.usage is not None
    assert final.usage.completion_tokens > 0
    assert b"violence" not in clients.tee.raw
    assert b"insulting" not in clients.tee.raw


def test_usage_comes_once_and_last(clients: Clients, upstream: Streams) -> None:
    upstream.answers = [Answer(Completion((Choice(pieces(LONG)),)))]
    made = clients.openai.chat.completions.create(stream=True, **WITH_USAGE)
    chunks = list(made)
    assert [chunk.usage is not None for chunk in chunks].count(True) == 1
    assert chunks[-1].usage is not None
    assert chunks[-1].choices == []
    assert data_of(clients.tee.raw)[-1] == "[DONE]"


@pytest.mark.usefixtures("signs_of_life")
@pytest.mark.parametrize("kind", ["chat", "messages", "responses"])
def test_an_error_in_a_stream_is_the_clients_own(
    clients: Clients, upstream: Streams, kind: str
) -> None:
    wire = WIRES[kind]
    upstream.answers = [written([*wire.growing(LONG), wire.error], delay=0.1)]
    if kind == "messages":
        with pytest.raises(anthropic.APIStatusError, match="ended with an error"):
            message_streamed(clients, SAFE)
    elif kind == "chat":
        with pytest.raises(openai.APIError):
            chat_created(clients, SAFE)
    else:
        # Of a response, an error is an event that the client gives as it is.
        with clients.openai.responses.stream(model="m", input=SAFE) as stream:
            last = list(stream)[-1]
        assert last.type == "error"
        assert last.code == "upstream_malformed"
    assert b"broke" not in clients.tee.raw
