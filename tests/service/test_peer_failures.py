"""What users of other gateways and guards reported as broken, each as a test of this one.

The comment over a test names where it was reported. Streams that are released while they are
judged have tests of their own.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from service.chat import ChatDialect
from service.completions import CompletionsDialect
from service.errors import GuardUnavailable, SluicegateError
from service.exchange import Dialect
from service.messages import MessagesDialect
from service.policy import Policy
from service.responses import ResponsesDialect
from tests.fake_upstream import Answer, FakeUpstream, ToolCall, compact, text, tools
from tests.guards import BrokenGuard, SlowGuard, WordGuard
from tests.service.conftest import StartServer
from tests.service.rig import BAD, GRAVE, REFUSAL, SAFE, MakeRig, Rig, content, shown

CHAT, COMPLETIONS = ChatDialect(), CompletionsDialect()
RESPONSES, MESSAGES = ResponsesDialect(), MessagesDialect()
DIALECTS: tuple[Dialect, ...] = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)


def by_name(dialect: Dialect) -> str:
    return dialect.name


def asks(dialect: Dialect, words: str, **more: Any) -> dict[str, Any]:
    """A request of one user turn in each dialect."""
    turn = [{"role": "user", "content": words}]
    match dialect.name:
        case "completions":
            return {"prompt": words, **more}
        case "responses":
            return {"input": words, **more}
        case "messages":
            return {"messages": turn, "max_tokens": 16, **more}
        case _:
            return {"messages": turn, **more}


def says(dialect: Dialect, words: str) -> Answer:
    """An upstream's answer in each dialect."""
    usage = {"input_tokens": 3, "output_tokens": 2}
    body: dict[str, Any]
    match dialect.name:
        case "completions":
            choice = {"index": 0, "text": words, "logprobs": None, "finish_reason": "stop"}
            return Answer(body=compact({"id": "c", "model": "m", "choices": [choice]}))
        case "responses":
            part = {"type": "output_text", "text": words, "annotations": []}
            item = {
                "id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
                "content": [part],
            }  # fmt: skip
            body = {"id": "resp_1", "object": "response", "status": "completed", "model": "m"}
            return Answer(body=compact({**body, "output": [item], "usage": usage}))
        case "messages":
            body = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m"}
            block = {"type": "text", "text": words}
            body |= {"content": [block], "stop_reason": "end_turn", "usage": usage}
            return Answer(body=compact(body))
        case _:
            return text(words)


class TestEverySurface:
    # litellm #35257, #38953: guards did not run on one of the surfaces. One extractor, every one.
    @pytest.mark.parametrize("dialect", DIALECTS, ids=by_name)
    async def test_a_harmful_prompt_never_reaches_the_model(
        self, rig: Rig, dialect: Dialect
    ) -> None:
        reply = await rig.ask(dialect, asks(dialect, GRAVE))
        assert (reply.status, shown(reply)) == (200, ("blocked", "0"))
        assert REFUSAL in reply.body.decode()
        # litellm #18261: the model was called all the same, and the cost incurred.
        assert rig.fake.received == []

    @pytest.mark.parametrize("dialect", DIALECTS, ids=by_name)
    async def test_a_harmful_answer_never_reaches_the_client(
        self, rig: Rig, dialect: Dialect
    ) -> None:
        rig.answers(*[says(dialect, GRAVE)] * 6)
        reply = await rig.ask(dialect, asks(dialect, SAFE))
        assert shown(reply) == ("blocked", "6")
        assert GRAVE not in reply.body.decode()
        # litellm #35257: the audit log said success.
        assert {record.outcome for record in await rig.records() if record.attempts} == {
            "blocked", "allowed",
        }  # fmt: skip

    # Portkey #1205, guardrails-ai (reask), future-agi #42: no recovery, or a blind one.
    @pytest.mark.parametrize("dialect", DIALECTS, ids=by_name)
    async def test_a_harmful_answer_is_asked_for_again_and_the_new_one_is_judged(
        self, rig: Rig, dialect: Dialect
    ) -> None:
        rig.answers(says(dialect, BAD), says(dialect, BAD), says(dialect, "better"))
        reply = await rig.ask(dialect, asks(dialect, SAFE))
        assert shown(reply) == ("regenerated", "3")
        assert "better" in reply.body.decode()
        assert BAD not in reply.body.decode()

    # NeMo #1672, semantic-router: not really compatible. What nobody changed is the upstream's.
    @pytest.mark.parametrize("dialect", DIALECTS, ids=by_name)
    async def test_a_safe_answer_is_the_upstreams_byte_for_byte(
        self, rig: Rig, dialect: Dialect
    ) -> None:
        answer = says(dialect, "hello")
        rig.answers(answer)
        extra = {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1}
        reply = await rig.ask(dialect, asks(dialect, SAFE, **extra))
        if answer.body:
            assert reply.body == answer.body
        sent = rig.fake.received[0].json
        assert {key: sent[key] for key in extra} == extra

    # semantic-router #355: OpenWebUI hung on JSON where it had asked for a stream.
    @pytest.mark.parametrize("dialect", DIALECTS, ids=by_name)
    async def test_a_refusal_of_a_stream_is_a_stream(self, rig: Rig, dialect: Dialect) -> None:
        reply = await rig.ask(dialect, asks(dialect, GRAVE, stream=True))
        assert dict(reply.headers)["content-type"].startswith("text/event-stream")
        assert b"data: " in reply.body
        assert reply.body.endswith(b"\n\n")
        # litellm #38953: frames without their `event:` kill Anthropic's SDK.
        if dialect in (MESSAGES, RESPONSES):
            events = [event for event in reply.body.split(b"\n\n") if event]
            assert all(event.startswith(b"event: ") for event in events)


class TestEveryField:
    # aisix #546, #448, litellm-rs #1128, litellm #35999: not scanned, and forwarded.
    @pytest.mark.parametrize(
        "hidden",
        [
            {"messages": [{"role": "user", "content": "hi", "name": f"{GRAVE} x"}]},
            {"messages": [{"role": "tool", "content": GRAVE, "tool_call_id": "1"}]},
            {"messages": [{"role": "user", "content": "hi"}], "documents": [{"text": GRAVE}]},
            {"messages": [{"role": "user", "content": "hi", "content_blocks": [{"t": GRAVE}]}]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": GRAVE}]}]},
            {"messages": [{"role": "developer", "content": GRAVE}]},
            {"messages": [{"role": "user", "content": "hi"}], "new_field": {"deep": [GRAVE]}},
            {"messages": [{"role": "assistant", "content": GRAVE}]},
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {
                                "id": "1",
                                "type": "function",
                                # Escapes hide nothing.
                                "function": {
                                    "name": "send",
                                    "arguments": '{"t":"sever\\u0065-violence here"}',
                                },
                            }
                        ],
                    }
                ]
            },
        ],
    )
    async def test_words_that_reach_the_model_are_judged_wherever_they_stand(
        self, rig: Rig, hidden: dict[str, Any]
    ) -> None:
        assert shown(await rig.ask(CHAT, hidden)) == ("blocked", "0")
        assert rig.fake.received == []

    # aisix PR #815, NeMo #2024: what the model says beside its text.
    @pytest.mark.parametrize(
        "answer",
        [
            tools(ToolCall("send", json.dumps({"body": GRAVE}))),
            text("fine", reasoning=GRAVE),
            Answer(body=compact({"choices": [
                {"index": 0, "message": {"content": "fine", "content_blocks": [GRAVE]}}
            ]})),
            Answer(body=compact({"choices": [
                {"index": 0, "message": {"content": "fine"}, "note": GRAVE}
            ]})),
            Answer(body=compact({"choices": [
                {"index": 0, "message": {"content": "fine"}}
            ], "debug": {"said": GRAVE}})),
        ],
    )  # fmt: skip
    async def test_what_an_answer_says_beside_its_text_is_judged(
        self, rig: Rig, answer: Answer
    ) -> None:
        rig.answers(*[answer] * 6)
        reply = await rig.send()
        assert shown(reply)[0] == "blocked"
        assert GRAVE not in reply.body.decode()

    # litellm #39281: definitions scanned as a user's words gave false blocks.
    async def test_a_tools_definition_is_read_milder(self, rig: Rig) -> None:
        rig.answers(text("ok"))
        tool = {"type": "function", "function": {"name": "f", "description": "moderate-violence"}}
        assert shown(await rig.send(tools=[tool]))[0] == "annotated"

    # litellm #35332: an image was dropped before the check while the dashboard said it ran;
    # vllm #57157: the upstream fetches whatever URL it is given.
    @pytest.mark.parametrize("url", ["http://169.254.169.254/latest", "data:image/png;base64,AA"])
    async def test_an_image_is_an_explicit_refusal_and_no_url_reaches_the_upstream(
        self, rig: Rig, url: str
    ) -> None:
        part = {"type": "image_url", "image_url": {"url": url}}
        with pytest.raises(SluicegateError) as caught:
            await rig.send(messages=[{"role": "user", "content": [part]}])
        assert (caught.value.status, caught.value.code) == (400, "unscannable")
        assert rig.fake.received == []

    # semantic-router #3333, #3204, #3206: a verdict on the first 512 tokens.
    @pytest.mark.parametrize("place", [0, 0.5, 1])
    async def test_a_long_text_is_judged_whole(self, rig: Rig, place: float) -> None:
        words = ["w1"] * 6000
        words.insert(int(place * len(words)), GRAVE)
        assert shown(await rig.send(" ".join(words))) == ("blocked", "0")


class TestConversations:
    # openai-agents #2294, bedrock-access-gateway #107, aisix #1159: blocked for ever.
    async def test_one_bad_message_does_not_block_a_conversation_for_ever(self, rig: Rig) -> None:
        rig.answers(text("hello"))
        history = [
            {"role": "user", "content": GRAVE},
            {"role": "assistant", "content": REFUSAL},
            {"role": "user", "content": SAFE},
        ]
        assert shown(await rig.send(messages=history)) == ("annotated", "1")

    # litellm #40721: the whole history was judged again at each turn.
    async def test_an_earlier_turn_is_judged_once(self, rig: Rig) -> None:
        rig.answers(text("one"), text("two"))
        turns: list[dict[str, Any]] = [{"role": "user", "content": f"w{n}"} for n in range(6)]
        await rig.send(messages=turns)
        before = rig.metric("cache_requests_total", tier="local", result="miss")
        await rig.send(messages=[*turns, {"role": "user", "content": "w7"}])
        missed = rig.metric("cache_requests_total", tier="local", result="miss") - before
        # The new turn, the turns as one, and the answer.
        assert missed == 3


class TestOperations:
    # litellm #12159, #27272, #35666, #39136: labels without bound.
    async def test_no_client_makes_a_label(self, rig: Rig) -> None:
        rig.answers(*[text("ok")] * 20)

        def series() -> int:
            return sum(len(one.samples) for one in rig.runtime.metrics.registry.collect())

        for _ in range(2):  # the second finds its verdict remembered
            await rig.ask(CHAT, {"model": "m0", **asks(CHAT, "w1"), "user": "u0"})
        before = series()
        for number in range(18):
            body = {"model": f"m{number}", **asks(CHAT, "w1"), "user": f"u{number}"}
            await rig.ask(CHAT, body)
        assert series() == before

    # litellm #19779, #31461, #38568: an outage of the guard, and who hears of it.
    @pytest.mark.parametrize("words", ["poison", "rotten"])
    async def test_a_guard_that_fails_or_gives_nan(self, make_rig: MakeRig, words: str) -> None:
        async with make_rig(guard=BrokenGuard()) as rig:
            with pytest.raises(GuardUnavailable):
                await rig.send(words)
            assert rig.fake.received == []
        async with make_rig(Policy(fail="open"), guard=BrokenGuard()) as rig:
            rig.answers(text("ok"))
            assert shown(await rig.send(words))[0] == "bypassed"
            assert rig.metric("bypasses_total", reason="guard_unavailable") == 1
            assert rig.metric("outcomes_total", direction="prompt", outcome="allowed") == 0

    async def test_a_guard_that_is_slow(self, make_rig: MakeRig) -> None:
        guard = SlowGuard()
        async with make_rig(guard=guard, guard_seconds=0.2) as rig:
            with pytest.raises(GuardUnavailable, match="in time"):
                await rig.send()
            guard.let_go()

    # guardrails-ai #1375, #1298; PurpleLlama #116: parallel requests broke it.
    async def test_many_at_once_each_get_their_own_verdict(self, rig: Rig) -> None:
        rig.answers(*[text("ok")] * 20)
        prompts = [GRAVE if number % 2 else f"w{number}" for number in range(40)]
        replies = await asyncio.gather(*map(rig.send, prompts))
        for prompt, reply in zip(prompts, replies, strict=True):
            assert shown(reply)[0] == ("blocked" if prompt == GRAVE else "allowed")

    @pytest.fixture
    async def stalled(self, make_rig: MakeRig) -> AsyncIterator[Rig]:
        async with make_rig() as rig:
            rig.answers(text("late", delay=30.0))
            yield rig

    # litellm #8754, #13774, #37140: the client is gone and the model keeps generating.
    @pytest.mark.parametrize("dialect", DIALECTS, ids=by_name)
    async def test_a_client_that_goes_away_cancels_the_upstream(
        self, stalled: Rig, dialect: Dialect
    ) -> None:
        asked = asyncio.create_task(stalled.ask(dialect, asks(dialect, SAFE)))
        await stalled.fake.wait_for_request(1)
        asked.cancel()
        await stalled.fake.wait_for_disconnect()

    async def test_it_cancels_a_regeneration_too(self, rig: Rig) -> None:
        rig.answers(text(BAD), text("late", delay=30.0))
        asked = asyncio.create_task(rig.send())
        await rig.fake.wait_for_request(2)
        asked.cancel()
        await rig.fake.wait_for_disconnect()

    # llm-guard #97: models were loaded by the first call. Ready means that it judges.
    def test_it_is_ready_only_once_it_judges(self, start_server: StartServer) -> None:
        guard = WordGuard()
        server = start_server(guard=guard, upstream=FakeUpstream(text("ok")))
        assert server.client().get("/health/ready").status_code == 200
        answer = server.client().post("/v1/moderations", json={"input": "w1"})
        assert answer.status_code == 200

    # PurpleLlama #116: the guard ran on the event loop.
    def test_a_busy_guard_keeps_nobody_from_the_service(self, start_server: StartServer) -> None:
        guard = SlowGuard()
        server = start_server(guard=guard, upstream=FakeUpstream(text("ok")))
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(server.client().post, "/v1/moderations", json={"input": "w1"})
            guard.wait_until_entered()
            assert server.client().get("/health/live").status_code == 200
            guard.let_go()
            assert waiting.result(20).status_code == 200


async def test_choices_are_judged_one_by_one(rig: Rig) -> None:
    rig.answers(text("one", GRAVE, "three"), text("two"))
    reply = await rig.send(n=3)
    assert [content(reply, number) for number in range(3)] == ["one", "two", "three"]
