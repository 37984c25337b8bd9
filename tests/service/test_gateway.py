"""The proxied chat, end to end: a real upstream over HTTP, the real gate, batcher and records."""

import asyncio
import json
from typing import Literal

import aiohttp
import pytest

from models.taxonomy import Severity
from service.errors import (
    GuardUnavailable,
    NoUpstream,
    UpstreamError,
    UpstreamMalformed,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from service.policy import Action, Policy, Regenerate, Rule
from tests.fake_upstream import Answer, ToolCall, text, tools
from tests.guards import BrokenGuard
from tests.service.rig import BAD, CHAT, GRAVE, REFUSAL, SAFE, MakeRig, Rig, content, shown


def events_of(body: bytes) -> list[str]:
    return [line[6:] for line in body.decode().splitlines() if line.startswith("data: ")]


class TestPassing:
    @pytest.mark.parametrize("stream", [False, True])
    async def test_what_nobody_changed_is_passed_byte_for_byte(
        self, rig: Rig, stream: bool
    ) -> None:
        rig.answers(text("hello"), text("hello"))
        raw = (
            b'{ "stream":%s, "messages":[{"content":"caf\\u00e9","role":"user"}],"model":"m" }'
            % (b"true" if stream else b"false")
        )
        reply = await rig.send_raw(raw, headers={"content-type": "application/json", "x-new": "1"})
        (received,) = rig.fake.received
        assert received.body == raw
        assert ("x-new", "1") in received.headers
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{rig.fake.url}/v1/chat/completions", data=raw) as direct,
        ):
            assert reply.body == await direct.read()
            assert dict(reply.headers)["content-type"] == direct.headers["content-type"]
        if not stream:
            assert shown(reply) == ("allowed", "1")

    async def test_an_error_of_the_upstream_is_passed_unchanged(self, rig: Rig) -> None:
        rig.answers(Answer(body=b'{"error":{"message":"no"}}', status=404))
        reply = await rig.send()
        assert (reply.status, reply.body) == (404, b'{"error":{"message":"no"}}')
        assert rig.metric("outcomes_total", direction="response", outcome="error") == 1

    async def test_our_own_key_is_removed_before_forwarding(self, rig: Rig) -> None:
        rig.answers(text("hello"))
        await rig.send(moderation={"model": "x"}, top_k=1)
        assert "moderation" not in rig.fake.received[0].json
        assert rig.fake.received[0].json["top_k"] == 1


class TestBlocking:
    async def test_a_harmful_prompt_never_reaches_the_upstream(self, rig: Rig) -> None:
        reply = await rig.send(GRAVE)
        assert (reply.status, content(reply)) == (200, REFUSAL)
        assert json.loads(reply.body)["choices"][0]["finish_reason"] == "stop"
        assert shown(reply) == ("blocked", "0")
        assert rig.fake.received == []

    async def test_a_refused_stream_is_a_stream(self, rig: Rig) -> None:
        reply = await rig.send(GRAVE, stream=True)
        assert dict(reply.headers)["content-type"].startswith("text/event-stream")
        assert reply.body.count(b"data: [DONE]\n\n") == 1
        assert REFUSAL.encode() in reply.body

    async def test_a_mild_prompt_is_annotated_and_answered(self, rig: Rig) -> None:
        rig.answers(text("hello"))
        assert shown(await rig.send(BAD)) == ("annotated", "1")

    async def test_an_old_flagged_turn_blocks_only_where_the_policy_says_all(
        self, make_rig: MakeRig
    ) -> None:
        messages = [
            {"role": "user", "content": GRAVE},
            {"role": "assistant", "content": "no"},
            {"role": "user", "content": SAFE},
        ]
        cases: tuple[tuple[Literal["latest_turn", "all"], str], ...] = (
            ("latest_turn", "annotated"),
            ("all", "blocked"),
        )
        for context, outcome in cases:
            async with make_rig(Policy(context=context)) as rig:
                rig.answers(text("hello"))
                assert shown(await rig.send(messages=messages))[0] == outcome

    async def test_tool_arguments_are_judged(self, rig: Rig) -> None:
        call = ToolCall("send", json.dumps({"text": GRAVE}))
        rig.answers(*[tools(call)] * 6)
        reply = await rig.send()
        assert content(reply) == REFUSAL
        assert GRAVE.encode() not in reply.body


class TestRegenerating:
    async def test_a_flagged_answer_is_asked_for_again_and_told_why(self, rig: Rig) -> None:
        rig.answers(text(BAD), text("better"))
        reply = await rig.send(seed=7, temperature=0.5)
        assert content(reply) == "better"
        assert shown(reply) == ("regenerated", "2")
        first, second = (received.json for received in rig.fake.received)
        assert second["seed"] == 8
        assert second["temperature"] == 0.5
        instruction = second["messages"][0]
        assert instruction["role"] == "system"
        assert "insulting behavior" in instruction["content"]
        assert "minor" in instruction["content"]
        assert BAD not in instruction["content"]
        assert second["messages"][1:] == first["messages"]
        assert rig.metric("rounds_total", result="rescued") == 1
        assert rig.metric("wasted_tokens_total") > 0

    async def test_after_the_last_round_it_is_refused(self, rig: Rig) -> None:
        rig.answers(*[text(BAD)] * 6)
        reply = await rig.send()
        assert content(reply) == REFUSAL
        assert shown(reply) == ("blocked", "6")
        assert len(rig.fake.received) == 6
        seeds = {received.json.get("seed") for received in rig.fake.received}
        assert len(seeds) == 6
        assert rig.metric("rounds_total", result="exhausted") == 1

    async def test_only_the_flagged_choices_are_asked_for_again(self, rig: Rig) -> None:
        rig.answers(text("one", BAD, "three"), text("two"))
        reply = await rig.send(n=3)
        assert rig.fake.received[1].json["n"] == 1
        body = json.loads(reply.body)
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
        assert [content(reply, n) for n in range(3)] == ["one", "two", "three"]

    async def test_a_regenerated_stream_is_a_stream(self, rig: Rig) -> None:
        rig.answers(text(BAD), text("better"))
        reply = await rig.send(stream=True)
        assert rig.fake.received[1].json["stream"] is True
        chunks = CHAT.parse_stream(CHAT.parse(rig.fake.received[0].json), events_of(reply.body))
        assert chunks.choices[0].body["message"]["content"] == "better"
        assert BAD.encode() not in reply.body
        assert reply.body.endswith(b"data: [DONE]\n\n")

    async def test_the_identity_is_the_first_attempts_and_the_usage_the_accepted_ones(
        self, rig: Rig
    ) -> None:
        rig.answers(text(BAD), text("a much longer better answer than before"))
        body = json.loads((await rig.send()).body)
        assert body["object"] == "chat.completion"
        records = await rig.records()
        assert records[-1].response_tokens == body["usage"]["completion_tokens"]

    async def test_an_upstream_that_fails_in_a_later_round_ends_in_a_refusal(
        self, rig: Rig
    ) -> None:
        rig.answers(text(BAD), Answer(status=500, body=b"{}"))
        reply = await rig.send()
        assert (content(reply), shown(reply)[0]) == (REFUSAL, "blocked")

    async def test_the_deadline_ends_the_rounds(self, make_rig: MakeRig) -> None:
        policy = Policy(regenerate=Regenerate(deadline_seconds=0.3))
        async with make_rig(policy) as rig:
            rig.answers(text(BAD), text("late", delay=30.0))
            reply = await rig.send()
            assert (content(reply), shown(reply)[0]) == (REFUSAL, "blocked")
            await asyncio.wait_for(rig.fake.wait_for_disconnect(), 5)

    async def test_a_rule_may_block_where_another_regenerates(self, make_rig: MakeRig) -> None:
        rules = (
            Rule(
                direction="response",
                categories=("violence",),
                severity=Severity.SEVERE,
                action=Action.BLOCK,
            ),
            Rule(direction="response", severity=Severity.MINOR, action=Action.REGENERATE),
            Rule(action=Action.ALLOW),
        )
        async with make_rig(Policy(rules=rules)) as rig:
            rig.answers(text(GRAVE))
            assert shown(await rig.send(GRAVE)) == ("blocked", "1")


class TestRecords:
    async def test_every_exchange_leaves_one_record_a_direction_and_attempt(self, rig: Rig) -> None:
        rig.answers(text(BAD), text("better"))
        await rig.send()
        records = await rig.records()
        assert [(r.direction, r.action, r.level, r.outcome) for r in records] == [
            ("prompt", "allow", "none", "allowed"),
            ("response", "regenerate", "minor", "regenerated"),
            ("response", "allow", "none", "regenerated"),
        ]
        assert {record.request_id for record in records} == {"id1"}
        assert {record.weight for record in records} == {1.0}
        assert records[0].hash != records[1].hash
        kept = json.dumps([record.to_fields() for record in records])
        assert BAD not in kept
        assert SAFE not in kept

    async def test_passed_exchanges_are_sampled_and_flagged_ones_never_are(
        self, make_rig: MakeRig
    ) -> None:
        policy = Policy.model_validate({"record": {"sample_passed": 1e-9}})
        async with make_rig(policy) as rig:
            rig.answers(text("hello"), text("hello"))
            await rig.send()
            assert await rig.records() == []
            await rig.send(BAD)
            assert {record.weight for record in await rig.records()} == {1.0}

    async def test_what_was_acted_on_is_no_matter_of_sampling(self, make_rig: MakeRig) -> None:
        rules = [
            {"direction": "prompt", "severity": "none", "action": "block"},
            {"action": "allow"},
        ]
        policy = Policy.model_validate({"rules": rules, "record": {"sample_passed": 1e-9}})
        async with make_rig(policy) as rig:
            await rig.send()
            assert {record.outcome for record in await rig.records()} == {"blocked"}

    async def test_flags_are_counted_by_category_and_severity(self, rig: Rig) -> None:
        await rig.send(GRAVE)
        labels = {"category": "violence", "severity": "severe", "outcome": "blocked"}
        assert rig.metric("flagged_total", direction="prompt", **labels) == 1
        assert rig.metric("outcomes_total", direction="prompt", outcome="blocked") == 1


class TestFailing:
    @pytest.mark.parametrize(
        ("answer", "error"),
        [
            (Answer(body=b'{"choices":['), UpstreamMalformed),
            (Answer(body=b'{"choices":[],"choices":[]}'), UpstreamMalformed),
            (Answer(body=b"\xff"), UpstreamMalformed),
            (Answer(body=b"hello", content_type="text/html"), UpstreamMalformed),
            (text("hello", cut_after=40), UpstreamError),
            (text("hello", delay=30.0), UpstreamTimeout),
        ],
    )
    async def test_an_answer_that_cannot_be_judged_is_an_error(
        self, make_rig: MakeRig, answer: Answer, error: type[Exception]
    ) -> None:
        async with make_rig(upstream_first_byte_seconds=0.5) as rig:
            rig.answers(answer)
            with pytest.raises(error):
                await rig.send()
            assert rig.metric("outcomes_total", direction="response", outcome="error") == 1

    async def test_a_stream_that_ends_early_releases_nothing(self, rig: Rig) -> None:
        event = b'data: {"choices":[{"index":0,"delta":{"content":"half"}}]}\n\n'
        rig.answers(Answer(body=event, content_type="text/event-stream"))
        with pytest.raises(UpstreamMalformed):
            await rig.send(stream=True)

    async def test_an_upstream_that_is_down(self, make_rig: MakeRig) -> None:
        async with make_rig(upstream="http://127.0.0.1:9") as rig:
            with pytest.raises(UpstreamUnreachable):
                await rig.send()

    async def test_without_an_upstream_it_says_so(self, make_rig: MakeRig) -> None:
        async with make_rig(upstream=None) as rig:
            with pytest.raises(NoUpstream, match="--upstream"):
                await rig.send()

    async def test_a_guard_that_fails_lets_nothing_through(self, make_rig: MakeRig) -> None:
        async with make_rig(guard=BrokenGuard()) as rig:
            rig.answers(text("poison"))
            with pytest.raises(GuardUnavailable):
                await rig.send()
            assert rig.metric("outcomes_total", direction="response", outcome="error") == 1

    async def test_failing_open_passes_and_says_so(self, make_rig: MakeRig) -> None:
        async with make_rig(Policy(fail="open"), guard=BrokenGuard()) as rig:
            rig.answers(text("poison"))
            reply = await rig.send()
            assert shown(reply) == ("bypassed", "1")
            assert rig.metric("bypasses_total", reason="guard_unavailable") == 1
            assert rig.metric("outcomes_total", direction="response", outcome="bypassed") == 1

    async def test_a_cancelled_exchange_cancels_the_upstream(self, rig: Rig) -> None:
        rig.answers(text("late", delay=30.0))
        task = asyncio.create_task(rig.send())
        await rig.fake.wait_for_request()
        task.cancel()
        await asyncio.wait_for(rig.fake.wait_for_disconnect(), 5)
