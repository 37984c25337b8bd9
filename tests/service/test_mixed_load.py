"""The clients of the mixed load: what they call a good answer, a leak, and a failure."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from benchmarks.mixed_load import Answered, Clients, Traffic
from benchmarks.mixed_upstream import HARM
from tests.fake_upstream import Answer, FakeUpstream, Received, compact, error, events, text

EACH_KIND = 10
MODERATION = "/v1/moderations"
REFUSED = text("I can't help with that.")
Service = Callable[[Received], Answer]


async def asked(service: Service | Answer) -> list[Answered]:
    """What came of one request of each kind, sent to a service that answers so."""
    async with FakeUpstream(service) as server:
        clients = Clients(int(server.url.rpartition(":")[2]), Traffic("test"))
        for _ in range(EACH_KIND):
            await clients.ask()
        clients.close()
    return clients.answered


def service(chat: Answer, *, is_flagged: bool) -> Service:
    moderation = Answer(body=compact({"results": [{"flagged": is_flagged}]}))
    return lambda received: moderation if received.path == MODERATION else chat


async def test_a_service_that_refuses_all_harm_leaks_none() -> None:
    answered = await asked(service(REFUSED, is_flagged=True))
    assert all(one.is_good for one in answered)
    assert not any(one.is_leaked for one in answered)
    flagged = [one.asked.harmful for one in answered if one.is_flagged]
    assert Counter(flagged) == {"prompt": 3, "response": 2}


async def test_harm_that_reaches_a_client_is_a_leak_whole_or_streamed() -> None:
    answered = await asked(service(text(HARM), is_flagged=True))
    leaked = {(one.asked.path, one.asked.is_stream) for one in answered if one.is_leaked}
    assert leaked == {("/v1/chat/completions", False), ("/v1/chat/completions", True)}


async def test_harm_that_is_called_harmless_is_a_leak() -> None:
    answered = await asked(service(text("A fine day."), is_flagged=False))
    assert [one.asked.harmful for one in answered if one.is_leaked] == ["prompt"]


async def test_harm_that_came_before_a_cut_is_a_leak() -> None:
    harm = text(HARM)
    assert harm.completion is not None
    whole_bytes = sum(map(len, events(harm.completion, usage=False)))
    cut = replace(harm, cut_after=whole_bytes - 5)
    answered = await asked(lambda received: cut if received.json.get("stream") else REFUSED)
    streams = [one for one in answered if one.asked.is_stream]
    assert streams
    for one in streams:
        assert one.result == "cut"
        assert one.is_leaked
        assert not one.is_flagged


async def test_failures_are_told_apart() -> None:
    refused = error(503, "no", "guard_unavailable")
    assert {one.result for one in await asked(refused)} == {"503 503"}
    gone = Answer(wire=b"")
    assert {one.result for one in await asked(gone)} == {"no connection"}
    broken = Answer(
        body=b'data: {"error": {"code": "record_not_kept"}}\n\ndata: [DONE]\n\n',
        content_type="text/event-stream",
    )
    streams = {one.result for one in await asked(broken) if one.asked.is_stream}
    assert streams == {"in the stream: record_not_kept"}
