"""Routes: which upstream is asked, and when it is left alone; over real HTTP."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from service.breaker import Breaker
from service.errors import (
    NoUpstream,
    UnknownModel,
    UpstreamError,
    UpstreamMalformed,
    UpstreamTimeout,
    UpstreamUnavailable,
    UpstreamUnreachable,
)
from service.routing import Route, Upstreams
from service.upstream import Deadlines, Upstream
from tests.fake_upstream import MODEL, Answer, FakeUpstream, compact, error, text

CHAT = "/v1/chat/completions"
BODY = b'{"model":"m","messages":[]}'
JSON = {"content-type": "application/json"}
FAILURES = 2
LONG = 30.0
GOOD = text("Hello.")
DOWN = error(503, "no capacity", "ServiceUnavailable")


@asynccontextmanager
async def route(
    url: str,
    *,
    name: str = "one",
    models: Sequence[str] = ("*",),
    rest: float = 60.0,
    first_byte: float = LONG,
    seen: list[tuple[str, bool]] | None = None,
) -> AsyncIterator[Route]:
    deadlines = Deadlines(LONG, first_byte, LONG, LONG)
    upstream = Upstream(url, api_key=None, deadlines=deadlines, max_body_bytes=1 << 20)
    observe = (lambda *one: None) if seen is None else (lambda *one: seen.append(one))
    made = Route(name, models, upstream, Breaker(FAILURES, rest), observe)
    await made.open()
    try:
        yield made
    finally:
        await made.close()


async def ask(one: Route) -> int:
    """The status of the answer, or of the error."""
    try:
        return (await one.post(CHAT, BODY, JSON)).status
    except UpstreamError as failure:
        return failure.status


class TestBreaking:
    @pytest.mark.parametrize(
        "answer",
        [
            error(502, "bad gateway", "BadGateway"),
            DOWN,
            error(504, "late", "GatewayTimeout"),
            Answer(wire=b""),
        ],
    )
    async def test_after_failures_in_a_row_it_is_not_asked_again(self, answer: Answer) -> None:
        seen: list[tuple[str, bool]] = []
        async with FakeUpstream(answer) as fake, route(fake.url, seen=seen) as one:
            for _ in range(FAILURES):
                assert one.is_available
                await ask(one)
            assert not one.is_available
            count = len(fake.received)
            with pytest.raises(UpstreamUnavailable) as refused:
                await one.post(CHAT, BODY, JSON)
            assert len(fake.received) == count
        assert refused.value.status == 503
        assert 1 <= int(refused.value.headers()["retry-after"]) <= 60
        assert "one" in refused.value.message
        # What was not asked is not observed either.
        assert seen == [("one", False)] * FAILURES

    async def test_no_connection_and_no_answer_in_time_are_failures(self) -> None:
        async with FakeUpstream() as gone:
            url = gone.url
        async with route(url) as one:
            for _ in range(FAILURES):
                with pytest.raises(UpstreamUnreachable):
                    await one.get("/v1/models", {})
            assert not one.is_available
        slow = text("Hello.", delay=5)
        async with FakeUpstream(slow) as fake, route(fake.url, first_byte=0.05) as one:
            for _ in range(FAILURES):
                with pytest.raises(UpstreamTimeout):
                    await one.post(CHAT, BODY, JSON)
            assert not one.is_available

    @pytest.mark.parametrize(
        "answer",
        [
            error(400, "bad request"),
            error(401, "who are you"),
            error(404, "no such model"),
            error(429, "too many"),
            error(500, "cannot compute"),
            text("Hello.", gzip=True),
            text("Hello.", cut_after=20),
            Answer(wire=b"no HTTP at all\r\n\r\n"),
        ],
    )
    async def test_an_answer_of_another_kind_is_no_failure_even_where_it_cannot_be_read(
        self, answer: Answer
    ) -> None:
        seen: list[tuple[str, bool]] = []
        async with FakeUpstream(answer) as fake, route(fake.url, seen=seen) as one:
            for _ in range(3 * FAILURES):
                await ask(one)
            assert one.is_available
            assert len(fake.received) == 3 * FAILURES
        assert {answered for _, answered in seen} == {True}

    async def test_a_success_between_failures_begins_the_count_anew(self) -> None:
        async with FakeUpstream([DOWN, GOOD] * 4) as fake, route(fake.url) as one:
            assert [await ask(one) for _ in range(8)] == [503, 200] * 4
            assert one.is_available

    async def test_after_a_rest_one_call_tries_it_and_success_closes(self) -> None:
        async with FakeUpstream(DOWN) as fake, route(fake.url, rest=0.05) as one:
            for _ in range(FAILURES):
                await ask(one)
            await asyncio.sleep(0.06)
            fake.answers = text("Hello.", delay=0.1)
            count = len(fake.received)
            statuses = await asyncio.gather(*(ask(one) for _ in range(5)))
            assert sorted(statuses) == [200, 503, 503, 503, 503]
            assert len(fake.received) == count + 1
            assert one.is_available
            fake.answers = GOOD
            assert await asyncio.gather(*(ask(one) for _ in range(5))) == [200] * 5

    async def test_a_trial_that_fails_leaves_it_alone_again(self) -> None:
        async with FakeUpstream(DOWN) as fake, route(fake.url, rest=0.05) as one:
            for _ in range(FAILURES):
                await ask(one)
            await asyncio.sleep(0.06)
            await ask(one)
            count = len(fake.received)
            with pytest.raises(UpstreamUnavailable):
                await one.post(CHAT, BODY, JSON)
            assert len(fake.received) == count == FAILURES + 1

    async def test_a_trial_that_is_cancelled_leaves_room_for_another(self) -> None:
        async with FakeUpstream(DOWN) as fake, route(fake.url, rest=0.05) as one:
            for _ in range(FAILURES):
                await ask(one)
            await asyncio.sleep(0.06)
            fake.answers = text("Hello.", delay=5)
            trial = asyncio.create_task(ask(one))
            await fake.wait_for_request(FAILURES + 1)
            trial.cancel()
            await asyncio.gather(trial, return_exceptions=True)
            assert not one.is_available
            fake.answers = GOOD
            assert await ask(one) == 200
            assert one.is_available

    async def test_an_older_call_that_is_cancelled_makes_room_for_no_second_trial(self) -> None:
        async with FakeUpstream() as fake, route(fake.url, rest=0.05) as one:
            fake.answers = text("Hello.", delay=5)
            older = asyncio.create_task(ask(one))
            await fake.wait_for_request()
            fake.answers = DOWN
            for _ in range(FAILURES):
                await ask(one)
            await asyncio.sleep(0.06)
            fake.answers = text("Hello.", delay=0.2)
            trial = asyncio.create_task(ask(one))
            await fake.wait_for_request(FAILURES + 2)
            older.cancel()
            await asyncio.gather(older, return_exceptions=True)
            with pytest.raises(UpstreamUnavailable):
                await one.post(CHAT, BODY, JSON)
            assert await trial == 200
            assert len(fake.received) == FAILURES + 2

    async def test_calls_that_are_cancelled_are_no_failures(self) -> None:
        seen: list[tuple[str, bool]] = []
        async with (
            FakeUpstream(text("Hello.", delay=5)) as fake,
            route(fake.url, seen=seen) as one,
        ):
            for number in range(2 * FAILURES):
                call = asyncio.create_task(ask(one))
                await fake.wait_for_request(number + 1)
                call.cancel()
                await asyncio.gather(call, return_exceptions=True)
            assert one.is_available
        assert seen == []


class TestChoosing:
    @pytest.mark.parametrize(
        ("models", "model", "serves"),
        [
            (("*",), "anything/at-all", True),
            (("llama-3",), "llama-3", True),
            (("llama-3",), "llama-3.1", False),
            (("llama-3",), "Llama-3", False),
            (("llama-*",), "llama-3.1", True),
            (("llama-*", "qwen*"), "qwen3", True),
            (("llama-*",), "meta/llama-3", False),
            (("*/llama-*",), "meta/llama-3", True),
            ((), "m", False),
        ],
    )
    async def test_a_route_serves_names_and_patterns(
        self, models: Sequence[str], model: str, serves: bool
    ) -> None:
        async with route("http://127.0.0.1:9", models=models) as one:
            assert one.serves(model) is serves

    async def test_the_first_that_serves_a_model_is_asked(self) -> None:
        async with (
            route("http://127.0.0.1:9", name="a", models=["llama-*"]) as a,
            route("http://127.0.0.1:9", name="b", models=["*-3", "qwen"]) as b,
        ):
            upstreams = Upstreams([a, b])
            found = [upstreams.route(name).name for name in ("llama-3", "phi-3", "qwen")]
            assert found == ["a", "b", "b"]
            assert upstreams.first() is a
            with pytest.raises(UnknownModel) as unknown:
                upstreams.route("gpt")
        assert (unknown.value.status, unknown.value.code) == (404, "model_not_found")
        assert unknown.value.param == "model"

    def test_without_any_upstream_there_is_none_to_ask(self) -> None:
        for ask_for in (Upstreams([]).first, lambda: Upstreams([]).route("m")):
            with pytest.raises(NoUpstream):
                ask_for()


def listing(*names: str) -> Any:
    """A fake's function that lists models of these names."""
    body = compact({"object": "list", "data": [{"id": name} for name in names]})
    return Answer(wire=b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))


class Listing(FakeUpstream):
    """Answers every request as it is told, ``/v1/models`` too."""

    def _answer(self, received: Any) -> Answer:
        assert isinstance(self.answers, Answer)
        return self.answers


@asynccontextmanager
async def two(first: Answer, second: Answer, *models: Sequence[str]) -> AsyncIterator[Upstreams]:
    async with (
        Listing(first) as one,
        Listing(second) as other,
        route(one.url, name="a", models=models[0]) as a,
        route(other.url, name="b", models=models[1]) as b,
    ):
        yield Upstreams([a, b])


def names(models: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [model["id"] for model in models]


class TestModels:
    async def test_lists_are_merged_each_model_by_the_upstream_that_is_asked_for_it(self) -> None:
        first, second = listing("llama-3", "phi"), listing("llama-3", "qwen")
        async with two(first, second, ["llama-*"], ["*"]) as upstreams:
            assert names(await upstreams.models({})) == ["llama-3", "qwen"]

    async def test_what_no_route_serves_is_not_listed(self) -> None:
        async with two(listing("a", "x"), listing("b"), ["a"], ["c"]) as upstreams:
            assert names(await upstreams.models({})) == ["a"]

    @pytest.mark.parametrize(
        "bad",
        [
            DOWN,
            Answer(body=b"not JSON"),
            Answer(body=b"[]"),
            Answer(body=b'{"data": null}'),
            Answer(body=b'{"data": 3}'),
            Answer(wire=b""),
        ],
    )
    async def test_one_that_does_not_answer_hides_only_its_own(self, bad: Answer) -> None:
        async with two(bad, listing("qwen"), ["llama"], ["*"]) as upstreams:
            assert names(await upstreams.models({})) == ["qwen"]
        async with two(bad, bad, ["llama"], ["*"]) as upstreams:
            with pytest.raises(UpstreamError):
                await upstreams.models({})

    async def test_entries_that_are_none_are_left_out(self) -> None:
        odd = Answer(body=compact({"data": [1, None, "m", {"id": "m"}, {"object": "model"}]}))
        async with two(odd, listing("b"), ["m"], ["b"]) as upstreams:
            assert names(await upstreams.models({})) == ["m", "b"]

    async def test_the_fake_itself_is_listed(self) -> None:
        async with FakeUpstream() as fake, route(fake.url) as one:
            assert names(await Upstreams([one]).models({})) == [MODEL]


class TestDetokenizing:
    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            (Answer(body=compact({"prompt": "hello"})), "hello"),
            (Answer(body=compact({"prompt": ""})), ""),
            (Answer(body=compact({"prompt": None})), None),
            (Answer(body=compact({"text": "hello"})), None),
            (Answer(body=b"[]"), None),
            (Answer(body=b"hello"), None),
            (Answer(body=compact({"prompt": "hello"}), status=404), None),
        ],
    )
    async def test_the_text_of_token_ids_or_none(
        self, answer: Answer, expected: str | None
    ) -> None:
        async with FakeUpstream(answer) as fake, route(fake.url) as one:
            assert await one.detokenize("m", (1, 2), {"x-request-id": "7"}) == expected
        (received,) = fake.received
        assert (received.method, received.path) == ("POST", "/detokenize")
        assert received.json == {"model": "m", "tokens": [1, 2]}
        assert dict(received.headers)["x-request-id"] == "7"

    async def test_a_failure_is_one_of_the_upstream(self) -> None:
        async with FakeUpstream(text("x", gzip=True)) as fake, route(fake.url) as one:
            with pytest.raises(UpstreamMalformed):
                await one.detokenize("m", [1], {})
