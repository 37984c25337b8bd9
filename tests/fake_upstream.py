"""A small OpenAI-compatible upstream over real HTTP, which answers as it is told.

For tests, ``FakeUpstream`` takes one answer for every request, a list of answers to be used up in
order, or a function from the request to its answer. Its normal answers have vLLM's wire shape.

For benchmarks, ``python -m tests.fake_upstream --port N`` serves the same answer to everyone,
from bytes built beforehand.
"""

import argparse
import asyncio
import gzip
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, cast

import uvloop
from aiohttp import web

MODEL = "smollm2-135m-instruct"
FINGERPRINT = "vllm-0.32.0-66553a58"
HELLO = "Hello! How can I help you today?"


@dataclass(frozen=True, slots=True)
class Received:
    """A request as it came; header names are lower case. ``connection`` tells connections apart."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    connection: int

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function; ``arguments`` is JSON in a string."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice of a completion; a stream sends its text in ``pieces``."""

    pieces: tuple[str, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str | None = None
    finish_reason: str = "stop"

    @property
    def content(self) -> str | None:
        return "".join(self.pieces) or (None if self.tool_calls else "")


@dataclass(frozen=True, slots=True)
class Completion:
    """A chat completion, sent whole or as a stream, as the request asks."""

    choices: tuple[Choice, ...]
    id: str = "chatcmpl-a59b4ad4dd21237a"
    created: int = 1795622946
    model: str = MODEL
    prompt_tokens: int = 37
    completion_tokens: int = 8


@dataclass(frozen=True, slots=True)
class Answer:
    """What to answer: a completion, or a ``body`` of exact bytes.

    ``delay`` and ``pause`` are seconds before the first byte and between the events of a stream.
    After ``stall_after`` bytes of the body nothing more comes; after ``cut_after`` bytes the
    connection is closed. ``wire`` takes the place of the whole answer, status line included, and
    the connection is closed behind it; empty, it is closed without an answer.
    """

    completion: Completion | None = None
    body: bytes = b""
    status: int = 200
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0
    pause: float = 0
    stall_after: int | None = None
    cut_after: int | None = None
    gzip: bool = False
    wire: bytes | None = None


def text(*texts: str, reasoning: str | None = None, **changes: Any) -> Answer:
    """An answer with one choice for each text; ``changes`` are fields of Answer."""
    choices = tuple(Choice(pieces(item), reasoning=reasoning) for item in texts)
    return Answer(Completion(choices), **changes)


def tools(*calls: ToolCall, **changes: Any) -> Answer:
    """An answer that calls tools."""
    return Answer(
        Completion((Choice((), tool_calls=calls, finish_reason="tool_calls"),)), **changes
    )


def error(status: int, message: str, kind: str = "BadRequestError", **changes: Any) -> Answer:
    """An error in vLLM's shape."""
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return Answer(body=compact(body), status=status, **changes)


def pieces(content: str, size: int = 5) -> tuple[str, ...]:
    """A text cut into pieces of a few characters, about a token each."""
    return tuple(content[start : start + size] for start in range(0, len(content), size))


def compact(value: Any) -> bytes:
    """JSON as vLLM writes it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def whole(completion: Completion) -> bytes:
    """The body of a completion that is not streamed."""
    return compact(
        {
            "id": completion.id,
            "object": "chat.completion",
            "created": completion.created,
            "model": completion.model,
            "choices": [
                {
                    "index": index,
                    "message": _message(choice),
                    "logprobs": None,
                    "finish_reason": choice.finish_reason,
                    "stop_reason": None,
                    "token_ids": None,
                    "routed_experts": None,
                }
                for index, choice in enumerate(completion.choices)
            ],
            "service_tier": None,
            "system_fingerprint": FINGERPRINT,
            "usage": {
                **_usage(completion),
                "prompt_tokens_details": None,
                "completion_tokens_details": None,
            },
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "prompt_text": None,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }
    )


def events(completion: Completion, *, usage: bool) -> list[bytes]:
    """The events of a completion that is streamed; ``usage`` adds the chunk that counts tokens."""
    head = {
        "id": completion.id,
        "object": "chat.completion.chunk",
        "created": completion.created,
        "model": completion.model,
    }
    chunks: list[dict[str, Any]] = []
    for index, _ in enumerate(completion.choices):
        role = _delta(index, {"role": "assistant", "content": ""})
        chunks.append({"choices": [role], "prompt_token_ids": None, "prompt_text": None})
    for index, choice in enumerate(completion.choices):
        deltas = _deltas(choice)
        chunks += [{"choices": [_delta(index, delta) | {"token_ids": None}]} for delta in deltas]
        last = _delta(index, {"content": ""}, choice.finish_reason)
        chunks.append({"choices": [last | {"stop_reason": None, "token_ids": None}]})
    if usage:
        chunks.append({"choices": [], "usage": _usage(completion)})
    chunks[-1]["system_fingerprint"] = FINGERPRINT
    return [b"data: " + compact(head | chunk) + b"\n\n" for chunk in chunks] + [b"data: [DONE]\n\n"]


def _message(choice: Choice) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.content}
    message |= {"refusal": None, "annotations": None, "audio": None, "function_call": None}
    if choice.tool_calls:
        message["tool_calls"] = [
            {"id": f"chatcmpl-tool-{number}", "type": "function", "function": _function(call)}
            for number, call in enumerate(choice.tool_calls)
        ]
    return message | {"reasoning": choice.reasoning}


def _deltas(choice: Choice) -> list[dict[str, Any]]:
    deltas: list[dict[str, Any]] = [{"reasoning": part} for part in pieces(choice.reasoning or "")]
    deltas += [{"content": part} for part in choice.pieces]
    for number, call in enumerate(choice.tool_calls):
        opening = {"id": f"chatcmpl-tool-{number}", "type": "function", "index": number}
        deltas.append({"tool_calls": [opening | {"function": {"name": call.name}}]})
        deltas += [
            {"tool_calls": [{"index": number, "function": {"arguments": part}}]}
            for part in pieces(call.arguments)
        ]
    return deltas


def _delta(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _function(call: ToolCall) -> dict[str, str]:
    return {"name": call.name, "arguments": call.arguments}


def _usage(completion: Completion) -> dict[str, int]:
    return {
        "prompt_tokens": completion.prompt_tokens,
        "total_tokens": completion.prompt_tokens + completion.completion_tokens,
        "completion_tokens": completion.completion_tokens,
    }


MODELS = compact(
    {
        "object": "list",
        "data": [
            {"id": MODEL, "object": "model", "created": 1795622946, "owned_by": "vllm"}
            | {"root": MODEL, "parent": None, "max_model_len": 1024, "permission": []}
        ],
    }
)


class FakeUpstream:
    """The server: ``async with FakeUpstream(text("Hello")) as upstream`` and then ``upstream.url``.

    Without ``answers`` it greets; they may be replaced at any time. A request for which no answer
    is left gets a 500. GET /v1/models needs none. ``received`` holds the requests in their order,
    and ``disconnected`` those whose client went away before their answer had ended.
    """

    def __init__(
        self, answers: Answer | Iterable[Answer] | Callable[[Received], Answer] | None = None
    ) -> None:
        if answers is None:
            answers = text(HELLO)
        self.answers = answers if isinstance(answers, Answer) or callable(answers) else [*answers]
        self.received: list[Received] = []
        self.disconnected: list[Received] = []
        self.url = ""
        self._changed = asyncio.Condition()
        self._closing = asyncio.Event()

    async def __aenter__(self) -> Self:
        application = web.Application(client_max_size=1 << 30)
        application.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(application, handler_cancellation=True, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing.set()
        await self._runner.cleanup()

    async def wait_for_request(self, count: int = 1) -> None:
        """Returns once so many requests have come; fails after 5 s."""
        await self._wait_for(lambda: len(self.received) >= count)

    async def wait_for_disconnect(self, count: int = 1) -> None:
        """Returns once so many clients have gone away; fails after 5 s."""
        await self._wait_for(lambda: len(self.disconnected) >= count)

    async def _wait_for(self, reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(5), self._changed:
            await self._changed.wait_for(reached)

    async def _note(self, where: list[Received], received: Received) -> None:
        async with self._changed:
            where.append(received)
            self._changed.notify_all()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        received = Received(
            request.method,
            request.path_qs,
            tuple((name.lower(), value) for name, value in request.headers.items()),
            await request.read(),
            request.transport.get_extra_info("peername")[1],
        )
        await self._note(self.received, received)
        try:
            return await self._send(request, received, self._answer(received))
        except (asyncio.CancelledError, ConnectionError):
            await self._note(self.disconnected, received)
            raise

    def _answer(self, received: Received) -> Answer:
        if received.method == "GET" and received.path == "/v1/models":
            return Answer(body=MODELS)
        if isinstance(self.answers, Answer):
            return self.answers
        if callable(self.answers):
            return self.answers(received)
        if not self.answers:
            return error(500, "The fake upstream has no answer left.", "InternalServerError")
        return self.answers.pop(0)

    async def _send(
        self, request: web.Request, received: Received, answer: Answer
    ) -> web.StreamResponse:
        await self._pause(answer.delay)
        if answer.wire is not None:
            return await self._close(request, web.StreamResponse(), answer.wire)
        response = web.StreamResponse(status=answer.status, headers=answer.headers)
        parts = [answer.body]
        response.content_type = answer.content_type
        if answer.pause and answer.content_type == "text/event-stream":
            parts = [one + b"\n\n" for one in answer.body.split(b"\n\n") if one]
        if answer.completion is not None:
            asked = received.json
            if asked.get("stream"):
                options = asked.get("stream_options") or {}
                parts = events(answer.completion, usage=options.get("include_usage", False))
                response.headers["Content-Type"] = "text/event-stream; charset=utf-8"
            else:
                parts = [whole(answer.completion)]
        if answer.gzip:
            parts = [gzip.compress(b"".join(parts))]
            response.headers["Content-Encoding"] = "gzip"
        if len(parts) == 1:
            response.content_length = len(parts[0])
        await response.prepare(request)
        left = answer.stall_after if answer.stall_after is not None else answer.cut_after
        for number, part in enumerate(parts):
            if number:
                await self._pause(answer.pause)
            await response.write(part[:left])
            if left is not None and (left := left - len(part)) <= 0:
                break
        if answer.stall_after is not None:
            await self._pause(None)
        if answer.cut_after is not None:
            return await self._close(request, response, b"")
        await response.write_eof()
        return response

    async def _pause(self, seconds: float | None) -> None:
        """Waits for so long, or for ever; closing the server ends it."""
        if seconds == 0:
            return
        try:
            await asyncio.wait_for(self._closing.wait(), seconds)
        except TimeoutError:
            return

    async def _close(
        self, request: web.Request, response: web.StreamResponse, last: bytes
    ) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(last)
        request.transport.close()
        return response


class _Prebuilt(asyncio.Protocol):
    """HTTP of the least: one of two answers, as the request asks for a stream or not."""

    def __init__(self, answer: bytes, stream: bytes) -> None:
        self._answer = answer
        self._stream = stream
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n") + 4) >= 4:
            length = _CONTENT_LENGTH.search(self._buffer, 0, end)
            size = end + (int(length[1]) if length else 0)
            if len(self._buffer) < size:
                return
            streamed = _STREAM.search(self._buffer, end, size)
            self._buffer = self._buffer[size:]
            self._transport.write(self._stream if streamed else self._answer)


_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_STREAM = re.compile(rb'"stream" *: *true')


def prebuilt(content: str, model: str) -> tuple[bytes, bytes]:
    """The bytes of a whole answer and of a streamed one, status lines and headers included."""
    completion = Completion((Choice(pieces(content)),), model=model)
    body = whole(completion)
    head = b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: "
    answer = b"%sapplication/json\r\ncontent-length: %d\r\n\r\n%s" % (head, len(body), body)
    chunks = b"".join(
        b"%x\r\n%s\r\n" % (len(event), event) for event in events(completion, usage=False)
    )
    stream = head + b"text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
    return answer, stream + chunks + b"0\r\n\r\n"


async def serve(host: str, port: int, content: str, model: str) -> None:
    """Serves the same answer for ever, and prints the address once it can be used."""
    answer, stream = prebuilt(content, model)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Prebuilt(answer, stream), host, port)
    print(f"http://{host}:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A fake upstream that costs little.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--text", default=HELLO, help="what it answers")
    parser.add_argument("--model", default=MODEL, help="who it says that it is")
    options = parser.parse_args(arguments)
    uvloop.run(serve(options.host, options.port, options.text, options.model))


if __name__ == "__main__":
    main()
