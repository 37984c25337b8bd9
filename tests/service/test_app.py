"""The HTTP edge: what is refused, how, and that no answer, log line or metric says what came."""

import asyncio
import gzip
import json
import logging
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.fake_upstream import Answer, Choice, Completion, FakeUpstream, whole
from tests.guards import CANARY, BrokenGuard, SlowGuard, WordGuard
from tests.service.conftest import Server, StartServer

MODERATIONS, GUARD, CHAT = "/v1/moderations", "/v1/guard", "/v1/chat/completions"
ROUTES = (MODERATIONS, GUARD, CHAT)
LIMIT = 20_000
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    """Moderates without an upstream, with low limits."""
    return start_server(
        guard=BrokenGuard(), body_bytes=LIMIT, inputs_per_request=5, judged_tokens_per_request=2000
    )


@pytest.fixture(scope="module")
def client(server: Server) -> httpx.Client:
    return server.client()


def error(answer: httpx.Response) -> Any:
    """The error in an answer, whose shape is OpenAI's."""
    (shown,) = answer.json().values()
    assert list(answer.json()) == ["error"]
    assert shown.keys() == {"message", "type", "param", "code"}
    assert re.fullmatch(r"[^\n]+", shown["message"])
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    return shown


def body(**keys: Any) -> bytes:
    """JSON as a client writes it, a canary in it."""
    return json.dumps(keys | {"user": CANARY}).encode()


def chat(*messages: Any, **keys: Any) -> bytes:
    return body(messages=list(messages), **({"model": "m"} | keys))


def log(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the service logged during a test, tracebacks included."""
    formatter = logging.Formatter("%(levelname)s %(name)s %(message)s")
    # The client's loggers are not ours, and pytest turns on the access log that a service has off.
    others = ("httpx", "httpcore", "uvicorn.access", "asyncio.selector")
    records = caplog.get_records("call")
    return [formatter.format(one) for one in records if not one.name.startswith(others)]


SAYS = {"role": "user", "content": CANARY}
WORD = CANARY.encode()

# Bodies that no route can read.
UNREADABLE = {
    "nothing": (b"", "invalid_json"),
    "not JSON": (WORD, "invalid_json"),
    "cut short": (b'{"input": "' + WORD, "invalid_json"),
    "more behind it": (b'{"input": "a"}' + WORD, "invalid_json"),
    "not an object": (b'["' + WORD + b'"]', "invalid_json"),
    "a key twice": (b'{"input": "a", "input": "' + WORD + b'"}', "duplicate_key"),
    "a client's key twice": (b'{"' + WORD + b'": 1, "' + WORD + b'": 1}', "duplicate_key"),
    "not UTF-8": (b'{"input": "' + WORD + b'\xff"}', "invalid_utf8"),
    "UTF-16": (f'{{"input": "{CANARY}"}}'.encode("utf-16"), "invalid_utf8"),
    "a raw lone surrogate": (b'{"input": "' + WORD + b'\xed\xa0\x80"}', "invalid_utf8"),
    "an escaped lone surrogate": (b'{"input": "' + WORD + b'\\ud83d"}', "invalid_text"),
    "a lone surrogate in a key": (b'{"' + WORD + b'\\ud83d": 1}', "invalid_text"),
    "an escaped NUL": (b'{"input": "' + WORD + b'\\u0000"}', "invalid_text"),
    "a raw NUL": (b'{"input": "' + WORD + b'\x00"}', "invalid_json"),
    "a wrong escape": (b'{"input": "' + WORD + b'\\x41"}', "invalid_json"),
    "NaN": (b'{"' + WORD + b'": NaN}', "invalid_json"),
    "an infinity": (b'{"' + WORD + b'": 1e999}', "invalid_json"),
    "a huge integer": (b'{"' + WORD + b'": ' + b"9" * 5000 + b"}", "invalid_json"),
    "too deep": (b'{"' + WORD + b'": ' + b"[" * 9000 + b"]" * 9000 + b"}", "invalid_json"),
}

# Bodies that one route refuses: route, body, status, code, param.
REFUSED = {
    "no input": (MODERATIONS, body(), 400, "invalid_request", "input"),
    "an empty input": (MODERATIONS, body(input=""), 400, "invalid_request", "input"),
    "a number": (MODERATIONS, body(input=3), 400, "invalid_request", "input"),
    "null": (MODERATIONS, body(input=None), 400, "invalid_request", "input"),
    "an object": (MODERATIONS, body(input={CANARY: 1}), 400, "invalid_request", "input"),
    "no inputs": (MODERATIONS, body(input=[]), 400, "invalid_request", "input"),
    "tokens": (MODERATIONS, body(input=[[1, 2]]), 400, "invalid_request", "input[0]"),
    "a part of another type": (
        MODERATIONS,
        body(input=[{"type": CANARY}]),
        400,
        "invalid_request",
        "input[0].type",
    ),
    "an image": (
        MODERATIONS,
        body(input=[{"type": "image_url", "image_url": {"url": CANARY}}]),
        400,
        "unscannable",
        "input[0]",
    ),
    "an unknown model": (
        MODERATIONS,
        body(input="a", model=CANARY),
        404,
        "model_not_found",
        "model",
    ),
    "a model that is none": (
        MODERATIONS,
        body(input="a", model=[CANARY]),
        400,
        "invalid_request",
        "model",
    ),
    "too many inputs": (MODERATIONS, body(input=[CANARY] * 6), 413, "too_many_inputs", "input"),
    "too many tokens": (MODERATIONS, body(input="w1 " * 2001), 413, "too_many_tokens", None),
    "poison": (MODERATIONS, body(input=f"{CANARY} poison"), 503, "guard_unavailable", None),
    "two poisons": (
        MODERATIONS,
        body(input=[f"{CANARY} poison", f"w1 {CANARY} poison"]),
        503,
        "guard_unavailable",
        None,
    ),
    "a guard's NaN": (MODERATIONS, body(input=f"{CANARY} rotten"), 503, "guard_unavailable", None),
    "nothing to check": (GUARD, b"{}", 400, "invalid_request", "prompt"),
    "an unknown key": (GUARD, body(prompt="a", **{CANARY: 1}), 400, "invalid_request", None),
    "a role that is none": (
        GUARD,
        json.dumps({"messages": [{"role": CANARY, "content": "a"}]}).encode(),
        400,
        "invalid_request",
        "messages[0].role",
    ),
    "no model": (CHAT, chat(SAYS, model=None), 400, "invalid_request", "model"),
    "an empty model": (CHAT, chat(SAYS, model=""), 400, "invalid_request", "model"),
    "no messages": (CHAT, chat(), 400, "invalid_request", "messages"),
    "messages that are none": (
        CHAT,
        body(model="m", messages=1),
        400,
        "invalid_request",
        "messages",
    ),
    "a message that is none": (CHAT, chat(CANARY), 400, "invalid_request", "messages[0]"),
    "an unknown role": (
        CHAT,
        chat(SAYS, {"role": CANARY}),
        400,
        "invalid_request",
        "messages[1].role",
    ),
    "content that is none": (
        CHAT,
        chat({"role": "user", "content": {CANARY: 1}}),
        400,
        "invalid_request",
        "messages[0].content",
    ),
    "stream that is none": (CHAT, chat(SAYS, stream=CANARY), 400, "invalid_request", "stream"),
    "n that is none": (CHAT, chat(SAYS, n=CANARY), 400, "invalid_request", "n"),
    "n that is true": (CHAT, chat(SAYS, n=True), 400, "invalid_request", "n"),
    "too many choices": (CHAT, chat(SAYS, n=10**9), 400, "invalid_request", "n"),
    "no upstream": (CHAT, chat(SAYS), 503, "no_upstream", None),
}


class TestBadInput:
    @pytest.fixture(autouse=True)
    def nothing_is_echoed(
        self,
        server: Server,
        client: httpx.Client,
        caplog: pytest.LogCaptureFixture,
        answers: list[httpx.Response],
    ) -> Iterator[None]:
        """Holds for every test here: after a bad request the service is as well as before."""
        caplog.set_level(logging.DEBUG)
        yield
        for answer in answers:
            assert CANARY not in answer.text
            assert CANARY not in str(answer.headers)
        logged = log(caplog)
        assert not [line for line in logged if CANARY in line]
        assert not [line for line in logged if line.startswith(("ERROR", "CRITICAL"))]
        assert CANARY not in server.metrics()
        assert client.get("/health/ready").status_code == 200

    @pytest.fixture
    def answers(self) -> list[httpx.Response]:
        return []

    @pytest.fixture
    def post(
        self, client: httpx.Client, answers: list[httpx.Response]
    ) -> Callable[..., httpx.Response]:
        def send(route: str, content: Any, headers: Any = JSON) -> httpx.Response:
            answers.append(client.post(route, content=content, headers=headers))
            return answers[-1]

        return send

    @pytest.mark.parametrize("route", ROUTES)
    @pytest.mark.parametrize("name", UNREADABLE)
    def test_a_body_that_cannot_be_read_in_one_way_is_400(
        self, post: Callable[..., httpx.Response], route: str, name: str
    ) -> None:
        raw, code = UNREADABLE[name]
        answer = post(route, raw)
        shown = error(answer)
        assert (answer.status_code, shown["code"]) == (400, code)
        assert shown["type"] == "invalid_request_error"

    @pytest.mark.parametrize("name", REFUSED)
    def test_what_a_route_refuses_has_its_status_its_code_and_its_place(
        self, post: Callable[..., httpx.Response], name: str
    ) -> None:
        route, raw, status, code, param = REFUSED[name]
        answer = post(route, raw)
        shown = error(answer)
        assert (answer.status_code, shown["code"], shown["param"]) == (status, code, param)

    @pytest.mark.parametrize("route", ROUTES)
    def test_a_body_over_the_limit_is_413(
        self, post: Callable[..., httpx.Response], route: str
    ) -> None:
        answer = post(route, WORD * LIMIT)
        assert (answer.status_code, error(answer)["code"]) == (413, "body_too_large")
        assert str(LIMIT) in error(answer)["message"]

    def test_a_body_at_the_limit_is_read(self, post: Callable[..., httpx.Response]) -> None:
        raw = b'{"input": "w1"}'
        assert post(MODERATIONS, raw + b" " * (LIMIT - len(raw))).status_code == 200
        assert post(MODERATIONS, raw + b" " * (LIMIT - len(raw) + 1)).status_code == 413

    def test_a_body_of_unstated_length_is_counted_as_it_comes(
        self, post: Callable[..., httpx.Response]
    ) -> None:
        answer = post(MODERATIONS, iter([WORD * 100] * (LIMIT // 100)))
        assert "content-length" not in answer.request.headers
        assert (answer.status_code, error(answer)["code"]) == (413, "body_too_large")
        assert post(MODERATIONS, iter([b'{"input"', b': "w1"}'])).status_code == 200

    def test_every_depth_is_forwarded_or_refused(self, start_server: StartServer) -> None:
        """What parses just so must not fail later, where it is written again."""
        said = Answer(body=whole(Completion((Choice(("w1",)),))))
        client = start_server(upstream=FakeUpstream(said)).client()
        head = chat({"role": "user", "content": "w1"}, moderation={})[:-1] + b', "x": '
        for depth in (100, *range(960, 1000, 2)):
            answer = client.post(CHAT, content=head + b"[" * depth + b"]" * depth + b"}")
            assert answer.status_code in (200, 400)

    @pytest.mark.parametrize("encoding", ["gzip", "br", "x-" + CANARY])
    def test_an_encoded_body_is_refused_rather_than_misread(
        self, post: Callable[..., httpx.Response], encoding: str
    ) -> None:
        raw = gzip.compress(body(input=CANARY))
        answer = post(MODERATIONS, raw, JSON | {"content-encoding": encoding})
        assert (answer.status_code, error(answer)["code"]) == (400, "unsupported_encoding")

    def test_identity_is_no_encoding(self, post: Callable[..., httpx.Response]) -> None:
        headers = {"content-encoding": "Identity"}
        assert post(MODERATIONS, b'{"input": "w1"}', headers).status_code == 200

    @pytest.mark.parametrize("path", [f"/v1/{CANARY}", "/", f"/v1/moderations?{CANARY}/../x"])
    def test_a_route_that_there_is_not_is_404(
        self, client: httpx.Client, answers: list[httpx.Response], path: str
    ) -> None:
        answers.append(client.get(path))
        if "?" in path:
            assert (answers[0].status_code, error(answers[0])["code"]) == (
                405,
                "method_not_allowed",
            )
        else:
            assert (answers[0].status_code, error(answers[0])["code"]) == (404, "unknown_route")

    @pytest.mark.parametrize("route", ROUTES)
    @pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
    def test_a_method_that_a_route_does_not_take_is_405(
        self, client: httpx.Client, answers: list[httpx.Response], route: str, method: str
    ) -> None:
        answers.append(client.request(method, route))
        shown = error(answers[0])
        assert (answers[0].status_code, shown["code"]) == (405, "method_not_allowed")
        assert "POST" in shown["message"]
        assert answers[0].headers["allow"] == "POST"

    def test_many_bad_requests_leave_a_service_that_judges(
        self, post: Callable[..., httpx.Response]
    ) -> None:
        with ThreadPoolExecutor(8) as threads:
            raws = [raw for raw, _ in UNREADABLE.values()] * 4
            raws += [raw for route, raw, *_ in REFUSED.values() if route == MODERATIONS] * 4
            statuses = {
                one.status_code for one in threads.map(lambda raw: post(MODERATIONS, raw), raws)
            }
        assert statuses == {400, 404, 413, 503}
        answer = post(MODERATIONS, b'{"input": ["w1", "severe-violence"]}')
        assert [one["severity"] for one in answer.json()["results"]] == ["none", "severe"]


class TestRequestIds:
    @pytest.mark.parametrize("given", ["a", "req-1.2:3_4", "x" * 128])
    def test_a_clients_id_is_kept(self, client: httpx.Client, given: str) -> None:
        answer = client.post(GUARD, json={"prompt": "w1"}, headers={"x-request-id": given})
        assert answer.headers["x-request-id"] == given
        assert answer.json()["id"] == f"guard-{given}"

    @pytest.mark.parametrize(
        "given", [b"", b"x" * 129, b"a b", b"a;b", b"<a>", b"\xe9", b"\xc3\xa9"]
    )
    def test_what_is_no_id_is_replaced(self, client: httpx.Client, given: bytes) -> None:
        headers = httpx.Headers({b"x-request-id": given})
        answer = client.post(GUARD, json={"prompt": "w1"}, headers=headers)
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])

    def test_ids_are_made_anew(self, client: httpx.Client) -> None:
        ids = {client.post(GUARD, json={}).headers["x-request-id"] for _ in range(3)}
        assert len(ids) == 3

    @pytest.mark.parametrize("path", ["/v1/models", "/nowhere", MODERATIONS])
    def test_other_routes_and_errors_have_one_too(self, client: httpx.Client, path: str) -> None:
        answer = client.get(path, headers={"x-request-id": "mine"})
        assert answer.headers["x-request-id"] == "mine"

    def test_the_record_has_it(self, server: Server, client: httpx.Client) -> None:
        client.post(GUARD, json={"prompt": "w1"}, headers={"x-request-id": "find-me"})
        (record,) = server.run(server.runtime.keeper.recorder.recent(1))
        assert record.request_id == "find-me"


class TestOperations:
    @pytest.mark.parametrize(("path", "status"), [("live", "live"), ("ready", "ready")])
    def test_health_asks_nobody(self, client: httpx.Client, path: str, status: str) -> None:
        answer = client.get(f"/health/{path}")
        assert (answer.status_code, answer.json()) == (200, {"status": status})

    def test_metrics_share_a_loopback_port(self, server: Server, client: httpx.Client) -> None:
        assert server.admin_url == server.url
        answer = client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=")
        assert list(text_string_to_metric_families(answer.text))

    def test_metrics_on_a_port_of_their_own_are_not_on_the_public_one(
        self, start_server: StartServer
    ) -> None:
        server = start_server(admin_port=0)
        assert server.admin_url != server.url
        public = server.client()
        assert public.get("/metrics").status_code == 404
        assert public.get("/health/ready").status_code == 200
        assert public.post(MODERATIONS, json={"input": "w1"}).status_code == 200
        with httpx.Client(base_url=server.admin_url, trust_env=False) as admin:
            assert "sluicegate_build_info" in admin.get("/metrics").text
            assert admin.get("/health/ready").status_code == 200
            assert admin.post(MODERATIONS, json={"input": "w1"}).status_code == 404
            # What names the port is the socket, which no header changes.
            host = server.admin_url.removeprefix("http://")
            assert public.get("/metrics", headers={"host": host}).status_code == 404

    def test_the_guard_is_the_model_where_there_is_no_upstream(self, client: httpx.Client) -> None:
        (model,) = client.get("/v1/models").json()["data"]
        assert (model["id"], model["object"]) == ("words-1", "model")

    def test_models_are_the_upstreams_where_there_is_one(self, start_server: StartServer) -> None:
        fake = FakeUpstream()
        answer = start_server(upstream=fake).client().get("/v1/models")
        assert answer.json() == httpx.get(f"{fake.url}/v1/models", trust_env=False).json()

    def test_an_upstream_that_is_away_is_said_to_be(self, start_server: StartServer) -> None:
        with socket.create_server(("127.0.0.1", 0)) as unused:
            port = unused.getsockname()[1]
        client = start_server(upstream=f"http://127.0.0.1:{port}").client()
        answer = client.get("/v1/models")
        assert (answer.status_code, error(answer)["code"]) == (502, "upstream_unreachable")
        assert client.get("/health/ready").status_code == 200
        assert client.post(MODERATIONS, json={"input": "w1"}).status_code == 200


class TestUnderLoad:
    """One guard at work, which the test holds."""

    @pytest.fixture
    def guard(self) -> Iterator[SlowGuard]:
        made = SlowGuard()
        yield made
        made.let_go()

    @pytest.fixture
    def slow(self, start_server: StartServer, guard: SlowGuard) -> Server:
        return start_server(guard=guard, waiting_windows=2)

    @pytest.fixture
    def threads(self) -> Iterator[ThreadPoolExecutor]:
        with ThreadPoolExecutor(8) as made:
            yield made

    def ask(self, server: Server, threads: ThreadPoolExecutor, text: str) -> Future[httpx.Response]:
        return threads.submit(server.client().post, MODERATIONS, json={"input": text})

    def until(self, server: Server, reached: Callable[[], bool]) -> None:
        async def wait() -> None:
            # What is waited for has no event of its own.
            while not reached():  # noqa: ASYNC110 - there is none
                await asyncio.sleep(0)

        server.run(wait())

    def test_more_than_may_wait_is_told_to_come_back(
        self, slow: Server, guard: SlowGuard, threads: ThreadPoolExecutor
    ) -> None:
        first = self.ask(slow, threads, "w1")
        guard.wait_until_entered()
        waiting = [self.ask(slow, threads, f"w{n}") for n in (2, 3)]
        self.until(slow, lambda: slow.sample("guard_waiting_windows") == 2)
        refused = slow.client().post(MODERATIONS, json={"input": "w4"})
        assert (refused.status_code, error(refused)["code"]) == (429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert error(refused)["type"] == "rate_limit_error"
        guard.let_go()
        assert [one.result().status_code for one in (first, *waiting)] == [200, 200, 200]
        assert slow.client().post(MODERATIONS, json={"input": "w4"}).status_code == 200

    def test_a_guard_at_work_keeps_no_one_from_other_routes(
        self, slow: Server, guard: SlowGuard, threads: ThreadPoolExecutor
    ) -> None:
        asked = self.ask(slow, threads, "w1")
        guard.wait_until_entered()
        client = slow.client()
        assert client.get("/health/live").status_code == 200
        assert client.get("/metrics").status_code == 200
        assert client.post(MODERATIONS, json={"input": 3}).status_code == 400
        assert not asked.done()
        guard.let_go()
        assert asked.result().status_code == 200

    def test_a_client_that_went_away_is_dropped_before_it_is_judged(
        self, slow: Server, guard: SlowGuard, threads: ThreadPoolExecutor
    ) -> None:
        first = self.ask(slow, threads, "w1")
        guard.wait_until_entered()
        raw = b'{"input": "w2"}'
        head = f"POST {MODERATIONS} HTTP/1.1\r\nhost: a\r\ncontent-length: {len(raw)}\r\n\r\n"
        address = slow.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1]))) as leaving:
            leaving.sendall(head.encode() + raw)
            self.until(slow, lambda: slow.sample("guard_waiting_windows") == 1)
        gone = {"route": MODERATIONS, "status": "499"}
        self.until(slow, lambda: slow.sample("http_requests_total", **gone) == 1)
        guard.let_go()
        assert first.result().status_code == 200
        assert slow.client().post(MODERATIONS, json={"input": "w3"}).status_code == 200
        words = [
            word for batch in guard.batches for window in batch for word in guard.words(window)
        ]
        assert "w1" in words
        assert "w3" in words
        assert "w2" not in words
        assert slow.sample("guard_waiting_windows") == 0

    def test_no_verdict_in_time_is_503_and_leaves_the_queue(
        self, start_server: StartServer, guard: SlowGuard
    ) -> None:
        server = start_server(guard=guard, guard_seconds=0.05)
        client = server.client()
        answer = client.post(MODERATIONS, json={"input": "w1"})
        assert (answer.status_code, error(answer)["code"]) == (503, "guard_unavailable")
        assert "guard_seconds" in error(answer)["message"]

    def test_a_body_that_does_not_come_is_not_waited_for(self, start_server: StartServer) -> None:
        server = start_server(body_seconds=0.1)
        address = server.url.removeprefix("http://").split(":")
        head = f"POST {MODERATIONS} HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n{{"
        with socket.create_connection((address[0], int(address[1])), timeout=30) as stalled:
            stalled.sendall(head.encode())
            answer = stalled.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"body_timeout" in answer


class _Bug(WordGuard):
    def prepare(self, item: Any) -> Any:
        raise KeyError(item.text)


class TestBugs:
    """A fault of our own: 500 without its text, and a log line that says where."""

    def test_a_bug_is_500_and_its_place_is_logged(
        self, start_server: StartServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        answer = start_server(guard=_Bug()).client().post(MODERATIONS, json={"input": CANARY})
        assert (answer.status_code, error(answer)["code"]) == (500, "internal_error")
        (line,) = log(caplog)
        assert "KeyError" in line
        assert "test_app.py" in line
        assert CANARY not in answer.text + line
