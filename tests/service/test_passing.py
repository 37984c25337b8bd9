"""What passes without a verdict, and that nothing else of the upstream can be reached."""

import asyncio
import json
import threading
from typing import Any

import httpx
import pytest

from models.guard import Guard
from tests.fake_upstream import MODEL, MODELS, Answer, FakeUpstream, Received, compact, error
from tests.guards import WordGuard
from tests.service.conftest import Server, StartServer

HELLO = [{"role": "user", "content": "hello"}]
IMAGE = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}
VERSION = b'{"version": "0.33.0" }'
COUNT = b'{"count":3,  "max_model_len":1024,"tokens":[1,2,3]}'
RERANKED = b'{"results":  []}'


def answer(received: Received) -> Answer:
    answers = {"/version": VERSION, "/tokenize": COUNT, "/v1/rerank": RERANKED}
    path = received.path.partition("?")[0]
    if path in answers:
        return Answer(body=answers[path])
    if path in ("/detokenize", "/v1/messages/count_tokens"):
        return Answer(body=compact({"path": path}))
    # Anything else that comes here came round the guard.
    return Answer(body=b"a way round")


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    return start_server(upstream=FakeUpstream(answer), open_routes=("POST /v1/rerank", "GET /load"))


@pytest.fixture(scope="module")
def client(server: Server) -> httpx.Client:
    return server.client()


@pytest.fixture
def received(server: Server) -> list[Received]:
    assert server.upstream is not None
    server.upstream.received.clear()
    return server.upstream.received


CLOSED = [
    "/invocations",
    "/inference/v1/generate",
    "/generate",
    "/v1/chat/completions/batch",
    "/v1/chat/completions/render",
    "/v1/completions/render",
    "/v1/messages/batches",
    "/generative_scoring",
    "/pooling",
    "/classify",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/realtime",
    "/v1/images/generations",
    "/score",
    "/v1/score",
    "/rerank",
    "/v2/rerank",
    "/v2/embed",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/sleep",
    "/wake_up",
    "/is_sleeping",
    "/pause",
    "/collective_rpc",
    "/update_weights",
    "/server_info",
    "/reset_prefix_cache",
    "/start_profile",
    "/tokenizer_info",
    "/health",
    "/ping",
    "/docs",
    "/openapi",
    "/v1",
    "/",
    "/v1/models/../../invocations",
    "//invocations",
    "/v1//chat/completions",
    "/V1/CHAT/COMPLETIONS",
    "/v1/chat/completions%2frender",
    "/tokenize/..%2finvocations",
    "/version/../sleep",
]
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]


class TestClosed:
    @pytest.mark.parametrize("path", CLOSED)
    def test_what_is_not_listed_is_not_there_in_any_method(
        self, server: Server, received: list[Received], path: str
    ) -> None:
        body = compact({"model": MODEL, "messages": HELLO, "prompt": "hello", "input": "hello"})
        client = server.client()
        for method in METHODS:
            # Not httpx's own reading of the path: it would take out what is tried here.
            url = httpx.URL(server.url, raw_path=path.encode())
            reply = client.request(method, url, content=body)
            assert reply.status_code == 404, method
            if method != "HEAD":
                assert reply.json()["error"]["code"] in ("unknown_route", "model_not_found")
        assert [one.path for one in received if one.path != "/v1/models"] == []

    def test_metrics_are_ours(self, client: httpx.Client, received: list[Received]) -> None:
        reply = client.get("/metrics")
        assert "sluicegate_" in reply.text
        assert received == []

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("GET", "/tokenize"),
            ("PUT", "/tokenize"),
            ("POST", "/version"),
            ("DELETE", "/v1/models"),
            ("POST", "/v1/models"),
            ("DELETE", f"/v1/models/{MODEL}"),
            ("GET", "/v1/rerank"),
            ("POST", "/load"),
        ],
    )
    def test_a_route_that_passes_does_so_in_its_own_method_only(
        self, client: httpx.Client, received: list[Received], method: str, path: str
    ) -> None:
        reply = client.request(method, path, content=b"{}")
        assert (reply.status_code, reply.json()["error"]["code"]) == (405, "method_not_allowed")
        assert received == []


class TestModels:
    def test_the_list_of_one_upstream_passes_as_it_is(self, client: httpx.Client) -> None:
        reply = client.get("/v1/models")
        assert (reply.status_code, reply.content) == (200, MODELS)

    def test_one_model_is_told_of_by_the_list(
        self, client: httpx.Client, received: list[Received]
    ) -> None:
        assert client.get(f"/v1/models/{MODEL}").json()["id"] == MODEL
        assert [one.path for one in received] == ["/v1/models"]

    @pytest.mark.parametrize(
        "name", ["gpt", "a/b", "..%2f..%2finvocations", "..%2f..%2fmetrics", "x%3fy=1", "%2e%2e"]
    )
    def test_another_name_is_not_asked_for_and_leads_to_no_other_route(
        self, server: Server, client: httpx.Client, received: list[Received], name: str
    ) -> None:
        url = httpx.URL(server.url, raw_path=b"/v1/models/" + name.encode())
        reply = client.get(url)
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
        assert {one.path for one in received} == {"/v1/models"}

    def test_without_an_upstream_the_guard_is_the_model(self, start_server: StartServer) -> None:
        guard: Guard = WordGuard()
        alone = start_server(guard=guard).client()
        assert [model["id"] for model in alone.get("/v1/models").json()["data"]] == [guard.id]
        assert alone.get(f"/v1/models/{guard.id}").json()["id"] == guard.id
        assert alone.get("/v1/models/gpt").status_code == 404
        assert alone.get("/version").json()["error"]["code"] == "no_upstream"

    def test_a_list_is_cut_to_what_is_served(self, start_server: StartServer) -> None:
        with FakeOnItsOwn() as url:
            one = {"name": "one", "url": url, "models": ["llama-*"]}
            server = start_server(upstreams=[one])
            client = server.client()
            assert client.get("/v1/models").json() == {"object": "list", "data": []}
            assert client.get(f"/v1/models/{MODEL}").json()["error"]["code"] == "model_not_found"

    def test_one_of_several_answers_for_each_model(self, start_server: StartServer) -> None:
        with FakeOnItsOwn() as url:
            upstreams = [
                {"name": "one", "url": url, "models": ["smollm2-*"]},
                {"name": "two", "url": url},
            ]
            client = start_server(upstreams=upstreams).client()
            models = client.get("/v1/models").json()["data"]
            assert [model["id"] for model in models] == [MODEL]


class FakeOnItsOwn:
    """A fake upstream on a thread of its own, for servers that name theirs by URL."""

    def __enter__(self) -> str:
        ready: list[str] = []
        is_ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()

        async def live() -> None:
            async with FakeUpstream() as fake:
                ready.append(fake.url)
                is_ready.set()
                await self._stop.wait()

        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(live()))
        self._thread.start()
        assert is_ready.wait(20)
        return ready[0]

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        self._loop.close()


RAW = f' {{"model" : "{MODEL}", "prompt":"Grüße,\\u0020x", "n": 1.0e3}}\r\n'


class TestCounting:
    @pytest.mark.parametrize(
        "raw",
        [
            RAW,
            '{"prompt": "no model"}',
            '{"model": null, "prompt": "no model"}',
            json.dumps({"model": MODEL, "messages": HELLO}),
            json.dumps({"messages": HELLO}),
            json.dumps({"messages": [{"role": "user", "content": "severe-violence"}]}),
        ],
    )
    def test_tokenize_passes_byte_for_byte(
        self, client: httpx.Client, received: list[Received], raw: str
    ) -> None:
        reply = client.post("/tokenize", content=raw.encode(), headers={"x-request-id": "7"})
        assert (reply.status_code, reply.content) == (200, COUNT)
        (one,) = received
        assert (one.method, one.path, one.body) == ("POST", "/tokenize", raw.encode())
        assert dict(one.headers)["x-request-id"] == "7"

    @pytest.mark.parametrize(
        "body",
        [
            {"messages": [{"role": "user", "content": [IMAGE]}]},
            {"model": MODEL, "messages": [{"role": "user", "content": [IMAGE]}]},
            {"prompt": "hello", "messages": [{"role": "user", "content": [IMAGE]}]},
            {"messages": HELLO, "chat_template": "{{ 7 * 7 }}"},
        ],
    )
    def test_what_the_upstream_would_fetch_or_run_does_not(
        self, client: httpx.Client, received: list[Received], body: dict[str, Any]
    ) -> None:
        reply = client.post("/tokenize", json=body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "unscannable")
        assert received == []

    def test_it_passes_where_the_policy_says_so(self, start_server: StartServer) -> None:
        policy = {"version": 1, "id": "p", "unscannable": "allow", "rules": [{"action": "allow"}]}
        server = start_server(policy=policy, upstream=FakeUpstream(answer))
        body = {"messages": [{"role": "user", "content": [IMAGE]}]}
        assert server.client().post("/tokenize", json=body).content == COUNT

    @pytest.mark.parametrize(
        "raw", [b"", b"hello", b"[]", b'{"prompt": "a", "Prompt": "b"}', b'{"prompt": "\xff"}']
    )
    def test_what_parsers_may_read_differently_does_not_pass(
        self, client: httpx.Client, received: list[Received], raw: bytes
    ) -> None:
        assert client.post("/tokenize", content=raw).status_code == 400
        assert received == []

    @pytest.mark.parametrize("path", ["/detokenize", "/v1/messages/count_tokens"])
    def test_the_others_pass_too(
        self, client: httpx.Client, received: list[Received], path: str
    ) -> None:
        raw = b'{"model": "%s",  "tokens": [1, 2]}' % MODEL.encode()
        assert client.post(path, content=raw).json() == {"path": path}
        assert [(one.path, one.body) for one in received] == [(path, raw)]

    def test_an_error_of_the_upstream_passes_as_it_is(self, start_server: StartServer) -> None:
        refused = error(422, "tokens must be a list")
        client = start_server(upstream=FakeUpstream(refused)).client()
        reply = client.post("/detokenize", json={"tokens": "x"})
        assert (reply.status_code, reply.content) == (422, refused.body)

    def test_a_model_that_no_upstream_serves_is_unknown(self, start_server: StartServer) -> None:
        one = {"name": "one", "url": "http://127.0.0.1:9", "models": ["llama"]}
        client = start_server(upstreams=[one]).client()
        reply = client.post("/tokenize", json={"model": "gpt", "prompt": "hello"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
        # One that names none goes to the first, which is not there.
        assert client.post("/tokenize", json={"prompt": "hello"}).status_code == 502

    def test_none_of_it_is_judged(self, server: Server, client: httpx.Client) -> None:
        guard = server.runtime.guard
        assert isinstance(guard, WordGuard)
        guard.batches.clear()
        client.post("/tokenize", json={"prompt": "severe-violence"})
        assert guard.batches == []


class TestOpened:
    def test_it_passes_as_it_is_and_is_counted(
        self, server: Server, client: httpx.Client, received: list[Received]
    ) -> None:
        before = server.sample("bypasses_total", reason="open_route")
        raw = b'{"query": "severe-violence",  "documents": []}'
        headers = {"content-type": "application/json", "x-forwarded-for": "10.0.0.1"}
        reply = client.post("/v1/rerank", content=raw, headers=headers)
        assert (reply.status_code, reply.content) == (200, RERANKED)
        assert [(one.method, one.path, one.body) for one in received] == [
            ("POST", "/v1/rerank", raw)
        ]
        assert "x-forwarded-for" not in dict(received[0].headers)
        assert client.get("/load").content == b"a way round"
        assert server.sample("bypasses_total", reason="open_route") == before + 2

    def test_version_passes_and_is_no_bypass(self, server: Server, client: httpx.Client) -> None:
        before = server.sample("bypasses_total", reason="open_route")
        assert client.get("/version").content == VERSION
        assert server.sample("bypasses_total", reason="open_route") == before
