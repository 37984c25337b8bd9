"""The client of the upstream, against a fake upstream over real HTTP."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service import http1
from service import upstream as module
from service.errors import (
    ConfigurationError,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from service.headers import header
from service.sse import EventParser
from service.upstream import (
    Deadlines,
    Upstream,
    UpstreamResponse,
    parse_base_url,
)
from tests.fake_upstream import (
    Answer,
    FakeUpstream,
    error,
    text,
)

ROOT = Path(__file__).parent.parent.parent
FIXTURES = ROOT / "tests" / "fixtures" / "vllm"
CHAT = "/v1/chat/completions"
BODY = b'{"model": "m",  "messages": []}'
STREAMED = b'{"model":"m","messages":[],"stream":true}'
JSON = {"content-type": "application/json"}
OK = b"HTTP/1.1 200 OK\r\n"
SHORT = 0.1
LONG = 30.0
UNHURRIED = Deadlines(LONG, LONG, LONG, LONG)
LIMIT = 1 << 20

LONG_TEXT = "word " * 50_000

Call = Callable[[Upstream], Awaitable[bytes]]
Run = Callable[[Coroutine[Any, Any, None]], None]


@asynccontextmanager
async def client(
    url: str,
    deadlines: Deadlines = UNHURRIED,
    *,
    api_key: str | None = None,
    ca_file: Path | None = None,
) -> AsyncIterator[Upstream]:
    upstream = Upstream(
        url, api_key=api_key, deadlines=deadlines, max_body_bytes=LIMIT, ca_file=ca_file
    )
    await upstream.open()
    try:
        yield upstream
    finally:
        await upstream.close()


async def post(upstream: Upstream) -> bytes:
    return (await upstream.post(CHAT, BODY, JSON)).body


async def stream(upstream: Upstream) -> bytes:
    async with upstream.stream(CHAT, STREAMED, JSON) as response:
        return b"".join([chunk async for chunk in response.chunks()])


both = pytest.mark.parametrize("call", [post, stream])


class TestCalls:
    async def test_a_whole_answer(self) -> None:
        async with FakeUpstream(text("Hello.")) as fake, client(fake.url) as upstream:
            response = await upstream.post(CHAT, BODY, JSON)

        assert isinstance(response, UpstreamResponse)
        assert response.status == 200
        assert header(response.headers, "content-type") == "application/json"
        assert json.loads(response.body)["choices"][0]["message"]["content"] == "Hello."
        assert 0 < response.seconds < LONG

    async def test_the_request_is_sent_as_it_is(self) -> None:
        body = '{ "prompt": "Grüße",\r\n "x": 1.0e3 }'.encode()
        async with FakeUpstream() as fake, client(fake.url) as upstream:
            await upstream.post(
                CHAT, body, {"content-type": "application/json", "x-request-id": "7"}
            )

        (received,) = fake.received
        assert (received.method, received.path, received.body) == ("POST", CHAT, body)
        assert dict(received.headers) == {
            "host": fake.url.removeprefix("http://"),
            "content-type": "application/json",
            "x-request-id": "7",
            "content-length": str(len(body)),
            "accept-encoding": "identity",
        }

    async def test_a_stream_comes_as_it_is_sent(self) -> None:
        answer = text("One two three.", pause=0.01)
        parser = EventParser()
        reads = []
        async with (
            FakeUpstream(answer) as fake,
            client(fake.url) as upstream,
            upstream.stream(CHAT, STREAMED, JSON) as response,
        ):
            async for chunk in response.chunks():
                reads.append(parser.feed(chunk))

        assert response.status == 200
        assert header(response.headers, "content-type") == "text/event-stream; charset=utf-8"
        assert len(reads) > 3
        assert [event for read in reads for event in read][-1].data == "[DONE]"

    async def test_models(self) -> None:
        async with FakeUpstream([]) as fake, client(fake.url + "/v1/") as upstream:
            response = await upstream.get("/v1/models", {})

        assert fake.received[0].path == "/v1/models"
        assert json.loads(response.body)["object"] == "list"

    @pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
    async def test_an_error_of_the_upstream_is_an_answer(self, status: int) -> None:
        answer = error(status, "No.", headers={"retry-after": "3"})
        async with FakeUpstream(answer) as fake, client(fake.url) as upstream:
            response = await upstream.post(CHAT, BODY, JSON)
            async with upstream.stream(CHAT, STREAMED, JSON) as streamed:
                body = await streamed.read()

        assert (response.status, response.body) == (status, answer.body)
        assert (streamed.status, body) == (status, answer.body)
        assert header(response.headers, "retry-after") == "3"

    async def test_repeated_headers_and_bytes_in_them_are_kept(self) -> None:
        wire = b"HTTP/1.1 200 OK\r\nX-A: 1\r\nx-a: \xff\r\nContent-Length: 2\r\n\r\n{}"
        async with FakeUpstream(Answer(wire=wire)) as fake, client(fake.url) as upstream:
            response = await upstream.post(CHAT, BODY, JSON)

        assert response.headers == (("x-a", "1"), ("x-a", "\xff"), ("content-length", "2"))

    async def test_the_key_of_the_upstream_replaces_the_clients(self) -> None:
        headers = {"authorization": "Bearer client", "x-api-key": "client"}
        async with FakeUpstream() as fake, client(fake.url, api_key="ours") as upstream:
            await upstream.post(CHAT, BODY, headers)
            await upstream.get("/v1/models", {})

        for received in fake.received:
            assert header(received.headers, "authorization") == "Bearer ours"
            assert header(received.headers, "x-api-key") is None

    async def test_without_a_key_the_clients_goes_through(self) -> None:
        async with FakeUpstream() as fake, client(fake.url) as upstream:
            await upstream.post(CHAT, BODY, {"authorization": "Bearer client"})

        assert header(fake.received[0].headers, "authorization") == "Bearer client"

    async def test_cookies_are_not_kept(self) -> None:
        answer = text("Hello.", headers={"set-cookie": "a=b"})
        # Some jars keep no cookie of an address, but all keep those of a name.
        async with (
            FakeUpstream(answer) as fake,
            client(fake.url.replace("127.0.0.1", "localhost")) as upstream,
        ):
            await post(upstream)
            await post(upstream)

        assert header(fake.received[1].headers, "cookie") is None

    async def test_no_proxy_is_taken_from_the_environment(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        async with FakeUpstream() as fake, client(fake.url) as upstream:
            assert await post(upstream)

    async def test_more_calls_at_once_than_the_default_pool_holds(self) -> None:
        count = 120
        async with (
            FakeUpstream(text("Hello.", stall_after=0)) as fake,
            client(fake.url) as upstream,
        ):
            calls = [asyncio.create_task(post(upstream)) for _ in range(count)]
            await fake.wait_for_request(count)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    async def test_a_call_before_opening_is_a_mistake_of_ours(self) -> None:
        upstream = Upstream("http://h", api_key=None, deadlines=UNHURRIED, max_body_bytes=LIMIT)

        with pytest.raises(RuntimeError, match="open"):
            await post(upstream)


class TestDeadlines:
    @both
    @pytest.mark.parametrize(
        ("deadline", "answer"),
        [
            ("first_byte", text("Hello.", delay=LONG)),
            ("idle", text("Hello.", stall_after=100)),
            ("total", text("Hello.", delay=LONG)),
            ("total", text("Hello.", stall_after=100)),
        ],
    )
    async def test_each_ends_the_call(self, call: Call, deadline: str, answer: Answer) -> None:
        message = f"its {deadline.replace('_', '-')} deadline is 0.1 s"
        deadlines = replace(UNHURRIED, **{deadline: SHORT})
        async with FakeUpstream(answer) as fake, client(fake.url, deadlines) as upstream:
            with pytest.raises(UpstreamTimeout, match=re.escape(message)):
                await call(upstream)
            await fake.wait_for_disconnect()

    async def test_total_though_it_never_idles(self) -> None:
        answer = text("word " * 1000, pause=0.01)
        async with (
            FakeUpstream(answer) as fake,
            client(fake.url, replace(UNHURRIED, total=SHORT)) as upstream,
        ):
            with pytest.raises(UpstreamTimeout, match="its total deadline"):
                await stream(upstream)
            await fake.wait_for_disconnect()

    async def test_connect(self) -> None:
        # There is no connection before TLS is agreed on, and this listener never says a word.
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"https://127.0.0.1:{listener.getsockname()[1]}"
            async with client(url, replace(UNHURRIED, connect=SHORT)) as upstream:
                with pytest.raises(UpstreamUnreachable, match="connect deadline"):
                    await post(upstream)

    async def test_connecting_counts_towards_the_first_byte(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"https://127.0.0.1:{listener.getsockname()[1]}"
            async with client(url, replace(UNHURRIED, first_byte=SHORT)) as upstream:
                with pytest.raises(UpstreamTimeout, match=r"first-byte deadline is 0\.1 s"):
                    await post(upstream)

    async def test_a_slow_reader_is_not_a_slow_upstream(self) -> None:
        chunks: list[bytes] = []
        async with (
            FakeUpstream(text("Hello.")) as fake,
            client(fake.url, replace(UNHURRIED, idle=3 * SHORT)) as upstream,
            upstream.stream(CHAT, STREAMED, JSON) as response,
        ):
            async for chunk in response.chunks():
                await asyncio.sleep(0 if chunks else 4 * SHORT)
                chunks.append(chunk)

        assert b"".join(chunks).endswith(b"[DONE]\n\n")

    async def test_an_error_of_the_reader_stays_its_own(self) -> None:
        async def fail_while_reading(upstream: Upstream) -> None:
            async with upstream.stream(CHAT, STREAMED, JSON) as response:
                async for _ in response.chunks():
                    raise ConnectionResetError("the client's")

        async with FakeUpstream() as fake, client(fake.url) as upstream:
            with pytest.raises(ConnectionResetError, match="the client's"):
                await fail_while_reading(upstream)


class TestBadUpstreams:
    @both
    async def test_down(self, call: Call) -> None:
        async with client(f"http://127.0.0.1:{free_port()}") as upstream:
            with pytest.raises(UpstreamUnreachable, match="ECONNREFUSED"):
                await call(upstream)

    @both
    async def test_plain_http_where_tls_was_expected(self, call: Call) -> None:
        async with FakeUpstream() as fake, client(f"https{fake.url[4:]}") as upstream:
            with pytest.raises(UpstreamUnreachable):
                await call(upstream)

    @both
    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            (Answer(wire=b""), "closed the connection before"),
            (text("secret", cut_after=100), "broke off before its end"),
            (text("secret", gzip=True), "is compressed"),
            (Answer(status=302, headers={"location": "/secret"}), "answered with status 302"),
            (Answer(status=304), "answered with status 304"),
            (Answer(status=307, headers={"location": "/secret"}), "answered with status 307"),
            (Answer(wire=b"HTTP/1.1 101 Secret\r\nupgrade: h2c\r\n\r\n"), "with status 101"),
            (Answer(wire=b"a secret\r\n\r\n"), "is not valid HTTP"),
            (Answer(wire=OK + b"content-length: secret\r\n\r\n"), "is not valid HTTP"),
            (Answer(wire=OK + b"x-a: " + b"secret" * 11_000 + b"\r\n\r\n"), "is not valid HTTP"),
            (Answer(wire=OK + b"transfer-encoding: chunked\r\n\r\nsecret\r\n"), "answer"),
            (Answer(body=b"secret" * LIMIT), "limit is 1048576 bytes"),
            (Answer(body=b"secret" * LIMIT, stall_after=1), "limit is 1048576 bytes"),
            (Answer(wire=OK + b"\r\n" + b"secret" * LIMIT), "limit is 1048576 bytes"),
        ],
    )
    async def test_a_bad_answer(self, call: Call, answer: Answer, message: str) -> None:
        async with FakeUpstream(answer) as fake, client(fake.url) as upstream:
            with pytest.raises(UpstreamError, match=message) as caught:
                await call(upstream)

        assert "secret" not in caught.value.message
        assert caught.value.__cause__ is None
        # Nor was it asked again: on a connection of its own the request may have been worked on.
        assert [received.path for received in fake.received] == [CHAT]

    @both
    async def test_as_large_as_allowed(self, call: Call) -> None:
        async with FakeUpstream(Answer(body=b"x" * LIMIT)) as fake, client(fake.url) as upstream:
            assert len(await call(upstream)) == LIMIT

    @both
    async def test_a_coding_that_changes_nothing(self, call: Call) -> None:
        answer = text("Hello.", headers={"content-encoding": "Identity"})
        async with FakeUpstream(answer) as fake, client(fake.url) as upstream:
            assert await call(upstream)

    async def test_half_a_json_is_passed_on_as_it_is(self) -> None:
        async with FakeUpstream(Answer(body=b'{"id":"ch')) as fake, client(fake.url) as upstream:
            assert await post(upstream) == b'{"id":"ch'


class TestConnections:
    async def test_a_connection_is_kept(self) -> None:
        async with FakeUpstream() as fake, client(fake.url) as upstream:
            await post(upstream)
            await stream(upstream)
            await post(upstream)

        assert len({received.connection for received in fake.received}) == 1

    @both
    async def test_a_kept_connection_that_was_closed_is_replaced_once(self, call: Call) -> None:
        answers = [text("One."), Answer(wire=b""), text("Two.")]
        async with FakeUpstream(answers) as fake, client(fake.url) as upstream:
            await post(upstream)
            assert await call(upstream)

        first, second, third = fake.received
        assert first.connection == second.connection != third.connection
        assert (second.body, second.headers) == (third.body, third.headers)

    async def test_it_is_replaced_once_only(self) -> None:
        answers = [text("One."), Answer(wire=b""), Answer(wire=b""), text("Two.")]
        async with FakeUpstream(answers) as fake, client(fake.url) as upstream:
            await post(upstream)
            with pytest.raises(UpstreamError, match="closed the connection"):
                await post(upstream)

        assert len(fake.received) == 3

    @pytest.mark.parametrize("wire", [b"H", b"HTTP/1.1 200 OK\r\ncontent-le"])
    async def test_an_answer_that_had_begun_is_not_asked_for_again(self, wire: bytes) -> None:
        answers = [text("One."), Answer(wire=wire), text("Two.")]
        async with FakeUpstream(answers) as fake, client(fake.url) as upstream:
            await post(upstream)
            with pytest.raises(UpstreamError):
                await post(upstream)

        assert len(fake.received) == 2

    @both
    @pytest.mark.parametrize("answer", [{"delay": LONG}, {"stall_after": 100}], ids=str)
    async def test_cancelling_a_call_is_seen_by_the_upstream(
        self, call: Call, answer: dict[str, Any]
    ) -> None:
        async with FakeUpstream(text("Hello.", **answer)) as fake, client(fake.url) as upstream:
            running = asyncio.ensure_future(call(upstream))
            await fake.wait_for_request()
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            await fake.wait_for_disconnect()

    async def test_leaving_a_stream_is_seen_by_the_upstream(self) -> None:
        answer = text("word " * 1000, pause=0.01)
        async with FakeUpstream(answer) as fake, client(fake.url) as upstream:
            async with upstream.stream(CHAT, STREAMED, JSON) as response:
                async for _ in response.chunks():
                    break
            await fake.wait_for_disconnect()

    async def test_closing_ends_what_runs(self) -> None:
        async with FakeUpstream(text("Hello.", delay=LONG)) as fake:
            async with client(fake.url) as upstream:
                running = asyncio.ensure_future(post(upstream))
                await fake.wait_for_request()
            await fake.wait_for_disconnect()
            with pytest.raises(UpstreamError):
                await running


def subclasses(kind: type[Exception]) -> Iterator[type[Exception]]:
    yield kind
    for subclass in kind.__subclasses__():
        yield from subclasses(subclass)


class TestErrors:
    def test_each_kind_has_a_place_in_the_table(self) -> None:
        assert set(module._ERRORS) == set(subclasses(http1.HttpError)) - {http1.HttpError}

    @pytest.mark.parametrize("kind", module._ERRORS)
    def test_a_message_names_the_kind(self, kind: type[http1.HttpError]) -> None:
        message = module._ours(kind("Word")).message

        assert message.endswith(". (Word)")
        assert module._ours(kind()).message == message.removesuffix(" (Word)")


class TestBaseUrl:
    @pytest.mark.parametrize(
        ("url", "base"),
        [
            ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
            ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000"),
            ("https://host/team/v1", "https://host/team"),
            ("https://host/team/", "https://host/team"),
            ("http://host/v12", "http://host/v12"),
            ("http://[::1]:8000/v1", "http://[::1]:8000"),
        ],
    )
    def test_accepted(self, url: str, base: str) -> None:
        assert parse_base_url(url) == base

    @pytest.mark.parametrize(
        "url",
        ["", "host:8000", "127.0.0.1", "http://", "unix:///vllm", "http://[::1", "http://ho st"]
        + [f"http://host{end}" for end in (":port", ":0", ":99999", "\n")],
    )
    def test_not_one_that_can_be_used(self, url: str) -> None:
        with pytest.raises(ConfigurationError, match=r"Write it as http://host:8000\."):
            parse_base_url(url)

    @pytest.mark.parametrize(
        ("url", "reason"),
        [
            ("ftp://host", "must begin with http:// or https://"),
            ("http://secret@host", "a user name or a password"),
            ("http://user:secret@host", "a user name or a password"),
            ("http://host/?key=secret", r"before any '\?'"),
            ("http://host/#secret", "before any"),
        ],
    )
    def test_refused_without_being_shown(self, url: str, reason: str) -> None:
        with pytest.raises(ConfigurationError, match=reason) as caught:
            parse_base_url(url)

        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize(
        ("url", "host", "target"),
        [
            ("http://Host:8000/v1", "host:8000", "/v1/models"),
            ("http://host:80", "host", "/v1/models"),
            ("https://host:443/team/v1", "host", "/team/v1/models"),
            ("https://host:80/tëam", "host:80", "/t%C3%ABam/v1/models"),
            ("http://[fe80::1%25eth0]:8000", "[fe80::1]:8000", "/v1/models"),
            ("http://bücher.example", "xn--bcher-kva.example", "/v1/models"),
        ],
    )
    def test_what_is_asked_for(self, url: str, host: str, target: str) -> None:
        upstream = Upstream(url, api_key=None, deadlines=UNHURRIED, max_body_bytes=LIMIT)

        head = http1.request_head("GET", upstream._prefix + "/v1/models", upstream._host, {}, None)

        assert head == f"GET {target} HTTP/1.1\r\nhost: {host}\r\n\r\n".encode()

    def test_a_key_that_is_no_header(self) -> None:
        with pytest.raises(ConfigurationError, match="printable") as caught:
            Upstream("http://h", api_key="secret\n", deadlines=UNHURRIED, max_body_bytes=LIMIT)

        assert "secret" not in str(caught.value)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
