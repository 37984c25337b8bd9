"""The clients that people use, and what each makes of a stream: its final object's text and end."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from langchain_core.messages import AIMessageChunk
from langchain_openai import ChatOpenAI

from tests.service.conftest import Server
from tests.service.rig import SAFE
from tests.service.test_anthropic_sdk import TOOL
from tests.service.wires import Streams

Seen = tuple[str, str | None]
"""A text, and how it ended."""


def turns(prompt: str) -> Any:
    """A conversation of one turn."""
    return [{"role": "user", "content": prompt}]


class Tee(httpx2.HTTPTransport):
    """Keeps what comes over the wire, beside what a client makes of it.

    ``heard`` is called while a stream says something of ``LONG``.
    """

    def __init__(self, heard: Callable[[], object]) -> None:
        super().__init__()
        self.raw = b""
        self.heard = heard

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.raw = b""
        response = super().handle_request(request)
        inner = response.stream
        assert isinstance(inner, httpx2.SyncByteStream)
        response.stream = _Copied(inner, self)
        return response


class _Copied(httpx2.SyncByteStream):
    def __init__(self, inner: httpx2.SyncByteStream, tee: Tee) -> None:
        self._inner = inner
        self._tee = tee

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._inner:
            self._tee.raw += piece
            if b"he w" in self._tee.raw:
                self._tee.heard()
            yield piece

    def close(self) -> None:
        self._inner.close()


@dataclass(frozen=True)
class Clients:
    """The stock clients, all before one server, over one wire that is listened to."""

    tee: Tee
    openai: openai.OpenAI
    anthropic: anthropic.Anthropic
    chat: ChatOpenAI
    responses: ChatOpenAI


def connected(server: Server) -> Clients:
    """Clients of a server whose upstream may go on once they have heard something."""
    fake = server.upstream
    assert isinstance(fake, Streams)
    goes_on = fake.goes_on.set
    tee = Tee(lambda: server.loop.call_soon_threadsafe(goes_on))
    http: Any = server.clients.enter_context(httpx2.Client(transport=tee, timeout=20))
    shared: dict[str, Any] = {"api_key": "unused", "max_retries": 0, "http_client": http}
    url = f"{server.url}/v1"
    chained: dict[str, Any] = {"model": "m", "base_url": url, **shared}
    return Clients(
        tee,
        openai.OpenAI(base_url=url, **shared),
        anthropic.Anthropic(base_url=server.url, **shared),
        ChatOpenAI(**chained),
        ChatOpenAI(use_responses_api=True, **chained),
    )


def chat_created(clients: Clients, prompt: str) -> Seen:
    made = clients.openai.chat.completions.create(model="m", messages=turns(prompt), stream=True)
    choices = [choice for chunk in made for choice in chunk.choices]
    (end,) = [choice.finish_reason for choice in choices if choice.finish_reason]
    return "".join(choice.delta.content or "" for choice in choices), end


def final_of(stream: Any) -> Any:
    """The final object of a chat. Where one was filtered, asking for it raises the client's own
    error, and what came stands in its snapshot.
    """
    stream.until_done()
    snapshot = stream.current_completion_snapshot
    if all(choice.finish_reason != "content_filter" for choice in snapshot.choices):
        return stream.get_final_completion()
    with pytest.raises(openai.ContentFilterFinishReasonError):
        stream.get_final_completion()
    return snapshot


def chat_streamed(clients: Clients, prompt: str) -> Seen:
    with clients.openai.chat.completions.stream(model="m", messages=turns(prompt)) as stream:
        shown = "".join(event.delta for event in stream if event.type == "content.delta")
        (choice,) = final_of(stream).choices
    assert choice.message.content == shown
    return shown, choice.finish_reason


def completions(clients: Clients, prompt: str) -> Seen:
    made = clients.openai.completions.create(model="m", prompt=prompt, stream=True)
    choices = [choice for chunk in made for choice in chunk.choices]
    reasons: list[str | None] = [choice.finish_reason for choice in choices]
    (end,) = [reason for reason in reasons if reason]
    return "".join(choice.text for choice in choices), end


def response_streamed(clients: Clients, prompt: str) -> Seen:
    with clients.openai.responses.stream(model="m", input=prompt) as stream:
        events = list(stream)
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    shown = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert last.response.output_text == shown
    (done,) = [e.text for e in events if e.type == "response.output_text.done"]
    assert done == shown
    assert [e.sequence_number for e in events] == list(range(len(events)))
    if last.response.status == "incomplete":
        assert last.response.incomplete_details is not None
        assert last.response.incomplete_details.reason == "content_filter"
    return shown, last.response.status


def message_streamed(clients: Clients, prompt: str) -> Seen:
    sdk = clients.anthropic
    with sdk.messages.stream(model="m", max_tokens=99, messages=turns(prompt)) as stream:
        shown = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(block.text for block in final.content if block.type == "text") == shown
    return shown, final.stop_reason


def chained(model: ChatOpenAI, prompt: str) -> AIMessageChunk:
    whole = AIMessageChunk(content="")
    for chunk in model.stream(prompt):
        assert isinstance(chunk, AIMessageChunk)
        whole += chunk
    return whole


def langchain_chat(clients: Clients, prompt: str) -> Seen:
    whole = chained(clients.chat, prompt)
    return whole.text, whole.response_metadata["finish_reason"]


def langchain_responses(clients: Clients, prompt: str) -> Seen:
    whole = chained(clients.responses, prompt)
    return whole.text, whole.response_metadata["status"]


def chat_call(clients: Clients) -> Seen:
    with clients.openai.chat.completions.stream(
        model="m",
        messages=turns(SAFE),
        tools=[{"type": "function", "function": {"name": "Letter"}}],
    ) as stream:
        (choice,) = final_of(stream).choices
    (made,) = choice.message.tool_calls or []
    return made.function.arguments, choice.finish_reason


def response_call(clients: Clients) -> Seen:
    with clients.openai.responses.stream(model="m", input=SAFE) as stream:
        events = list(stream)
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    return "".join(deltas), last.response.status


def message_call(clients: Clients) -> Seen:
    tool: Any = TOOL
    with clients.anthropic.messages.stream(
        model="m", max_tokens=99, messages=turns(SAFE), tools=[tool]
    ) as stream:
        partial = [e.partial_json for e in stream if e.type == "input_json"]
        final = stream.get_final_message()
    return "".join(partial), final.stop_reason


def langchain_call(clients: Clients) -> Seen:
    whole = chained(clients.chat, SAFE)
    (part,) = whole.tool_call_chunks
    return part["args"] or "", whole.response_metadata["finish_reason"]


Reads = Callable[[Clients, str], Seen]
SDKS: dict[str, tuple[str, Reads]] = {
    "openai chat create": ("chat", chat_created),
    "openai chat stream": ("chat", chat_streamed),
    "openai completions": ("completions", completions),
    "openai responses": ("responses", response_streamed),
    "anthropic": ("messages", message_streamed),
    "langchain chat": ("chat", langchain_chat),
    "langchain responses": ("responses", langchain_responses),
}
