"""Streams, end to end: what is released when, how a stream ends, and that it is never silent."""

import asyncio
import json
from typing import Any

import pytest

from models.taxonomy import Severity
from service import streaming
from service.body import dumps
from service.errors import Overloaded, SluicegateError
from service.policy import Action, Policy, Rule, Stream
from service.replies import Reply
from tests.fake_upstream import Answer, Choice, Completion, pieces, text
from tests.guards import BrokenGuard, SlowGuard
from tests.service.rig import BAD, CHAT, GRAVE, REFUSAL, SAFE, MakeRig, Rig

SENTENCE = "The weather on the hills is fine again today, and it will stay so. "
LONG = SENTENCE * 20


def asked(prompt: str = SAFE, **more: Any) -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": prompt}], "stream": True}
    return dumps(body | more).encode()


def chunks(body: bytes) -> list[dict[str, Any]]:
    """The chunks of a stream that ends as it should."""
    events = [line[6:] for line in body.decode().splitlines() if line.startswith("data: ")]
    assert events.count("[DONE]") == 1
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def said(body: bytes, choice: int = 0) -> tuple[str, list[str]]:
    """What a choice says, and how it ends."""
    parts = [c for chunk in chunks(body) for c in chunk["choices"] if c["index"] == choice]
    ends = [part["finish_reason"] for part in parts if part.get("finish_reason")]
    return "".join(part["delta"].get("content") or "" for part in parts), ends


async def whole(reply: Reply) -> bytes:
    assert reply.stream is not None
    return b"".join([piece async for piece in reply.stream])


class TestHold:
    async def test_a_safe_stream_is_the_upstreams_byte_for_byte(self, make_rig: MakeRig) -> None:
        bodies = []
        for mode in ("hold", "buffer", "monitor"):
            async with make_rig(Policy(stream=Stream(mode=mode))) as rig:
                rig.answers(text(LONG))
                reply = await rig.send(stream=True, stream_options={"include_usage": True})
                bodies.append(reply.body)
        assert bodies[0] == bodies[1] == bodies[2]
        assert said(bodies[0]) == (LONG, ["stop"])
        assert chunks(bodies[0])[-1]["usage"]["completion_tokens"] > 0

    async def test_text_comes_before_the_upstream_has_ended(self, rig: Rig) -> None:
        rig.answers(text(LONG, stall_after=6000))
        reply = await rig.begin(asked())
        assert reply.stream is not None
        first = await asyncio.wait_for(anext(reply.stream.__aiter__()), 5)
        assert b"The w" in first
        await reply.stream.aclose()
        await rig.fake.wait_for_disconnect()

    async def test_harm_after_some_text_ends_the_choice_and_is_not_sent(self, rig: Rig) -> None:
        rig.answers(text(f"{LONG}And now severe-violence here. {LONG}", pause=0.001))
        reply = await rig.send(stream=True)
        shown, ends = said(reply.body)
        assert ends == ["content_filter"]
        assert LONG.startswith(shown)
        assert len(shown) > 200
        assert b"violence" not in reply.body
        await rig.fake.wait_for_disconnect()
        records = await rig.records()
        assert {r.outcome for r in records if r.direction == "response"} == {"blocked"}

    async def test_harm_before_any_text_is_generated_again(self, rig: Rig) -> None:
        rig.answers(text(f"First {BAD}. {LONG}"), text(LONG))
        reply = await rig.send(stream=True)
        assert said(reply.body) == (LONG, ["stop"])
        assert rig.metric("rounds_total", result="rescued") == 1
        assert BAD.encode() not in reply.body

    async def test_after_the_last_round_it_is_refused(self, rig: Rig) -> None:
        rig.answers(*[text(f"First {BAD}. {LONG}")] * 6)
        reply = await rig.send(stream=True)
        assert said(reply.body) == (REFUSAL, ["stop"])

    async def test_of_three_choices_only_the_bad_one_is_generated_again(self, rig: Rig) -> None:
        rig.answers(text(LONG, f"First {BAD}. {LONG}", LONG), text("better"))
        reply = await rig.send(stream=True, n=3)
        assert [said(reply.body, n) for n in range(3)] == [
            (LONG, ["stop"]), ("better", ["stop"]), (LONG, ["stop"]),
        ]  # fmt: skip
        assert BAD.encode() not in reply.body

    async def test_of_three_choices_only_the_bad_one_is_cut(self, rig: Rig) -> None:
        rig.answers(text(LONG, f"{LONG}{GRAVE}. {LONG}", LONG, pause=0.001))
        reply = await rig.send(stream=True, n=3)
        assert said(reply.body, 0) == (LONG, ["stop"])
        shown, ends = said(reply.body, 1)
        assert ends == ["content_filter"]
        assert LONG.startswith(shown)
        assert said(reply.body, 2) == (LONG, ["stop"])

    async def test_a_choice_that_is_cut_before_any_of_it_was_sent_is_refused(
        self, make_rig: MakeRig
    ) -> None:
        """It is cleared in part, in an event that also says what is too short to be judged yet."""
        texts = [(0, "a fine day"), (1, LONG), (1, GRAVE)]
        items: list[dict[str, Any]] = [{"index": n, "delta": {"content": one}} for n, one in texts]
        items += [{"index": n, "delta": {}, "finish_reason": "stop"} for n in range(2)]
        chunks_of = [items[:2], *([item] for item in items[2:])]
        events = [dumps({"id": "x", "choices": chunk}) for chunk in chunks_of]
        body = "".join(f"data: {event}\n\n" for event in (*events, "[DONE]"))
        # Of an answer that is there before the prompt's verdict, no piece is judged by itself.
        async with make_rig(Policy(stream=Stream(speculative=False))) as rig:
            kind = "text/event-stream"
            rig.answers(Answer(body=body.encode(), content_type=kind, pause=0.2))
            reply = await rig.send(stream=True, n=2)
            assert said(reply.body, 0) == ("a fine day", ["stop"])
            assert said(reply.body, 1) == (REFUSAL, ["stop"])
            # Had none of it been cleared, it would have been generated again.
            assert len(rig.fake.received) == 1
            records = await rig.records()
            assert {r.outcome for r in records if r.direction == "response"} == {"blocked"}

    @pytest.mark.parametrize("mode", ["hold", "buffer"])
    async def test_nothing_is_released_before_its_verdict(
        self, make_rig: MakeRig, mode: Any
    ) -> None:
        guard = SlowGuard()
        async with make_rig(Policy(stream=Stream(mode=mode)), guard=guard) as rig:
            rig.answers(text(LONG))
            begun = asyncio.ensure_future(rig.begin(asked()))
            await rig.fake.wait_for_request()
            await asyncio.sleep(0.2)
            assert not begun.done()
            guard.let_go()
            assert said(await whole(await begun)) == (LONG, ["stop"])


class TestSpeculative:
    async def test_the_upstream_is_asked_while_the_prompt_is_judged(
        self, make_rig: MakeRig
    ) -> None:
        guard = SlowGuard()
        async with make_rig(guard=guard) as rig:
            rig.answers(text(LONG, delay=30.0))
            begun = asyncio.ensure_future(rig.begin(asked(GRAVE)))
            await rig.fake.wait_for_request()
            guard.let_go()
            reply = await begun
            assert said(reply.body) == (REFUSAL, ["stop"])
            await rig.fake.wait_for_disconnect()

    async def test_a_policy_may_wait_for_the_verdict(self, make_rig: MakeRig) -> None:
        async with make_rig(Policy(stream=Stream(speculative=False))) as rig:
            reply = await rig.begin(asked(GRAVE))
            assert said(reply.body) == (REFUSAL, ["stop"])
            assert rig.fake.received == []


class TestMonitor:
    async def test_harm_passes_and_is_told(self, make_rig: MakeRig) -> None:
        async with make_rig(Policy(stream=Stream(mode="monitor"))) as rig:
            rig.answers(text(f"{LONG}{GRAVE}. {LONG}"))
            reply = await rig.send(stream=True)
            assert said(reply.body) == (f"{LONG}{GRAVE}. {LONG}", ["stop"])
            assert rig.metric("outcomes_total", direction="response", outcome="annotated") == 1

    async def test_text_is_sent_at_once_and_counted(self, make_rig: MakeRig) -> None:
        guard = SlowGuard()
        async with make_rig(Policy(stream=Stream(mode="monitor")), guard=guard) as rig:
            rig.answers(text("a fine day"))
            begun = asyncio.ensure_future(rig.begin(asked()))
            await rig.fake.wait_for_request()
            guard.let_go()
            reply = await begun
            assert said(await whole(reply)) == ("a fine day", ["stop"])
            name = "released_before_verdict_characters_total"
            assert rig.metric(name) == len("a fine day")

    async def test_a_guard_that_fails_behind_is_a_bypass(self, make_rig: MakeRig) -> None:
        guard = BrokenGuard()
        async with make_rig(Policy(stream=Stream(mode="monitor")), guard=guard) as rig:
            rig.answers(text("poison"))
            reply = await rig.send(stream=True)
            assert said(reply.body) == ("poison", ["stop"])
            assert rig.metric("bypasses_total", reason="guard_unavailable") == 1
            assert rig.metric("outcomes_total", direction="response", outcome="bypassed") == 1


class TestVerdicts:
    async def test_the_verdict_that_is_told_is_the_gravest_of_all_pieces(
        self, make_rig: MakeRig
    ) -> None:
        rules = (Rule(severity=Severity.MINOR, action=Action.ANNOTATE), Rule(action=Action.ALLOW))
        async with make_rig(Policy(rules=rules)) as rig:
            rig.answers(text(f"First {BAD}. {LONG}", pause=0.001))
            reply = await rig.send_raw(asked(), wants_azure=True)
            told = [
                choice["content_filter_results"]
                for chunk in chunks(reply.body)
                for choice in chunk["choices"]
                if "content_filter_results" in choice
            ]
            levels = [one["severity"] for one in told[-1].values() if "severity" in one]
            assert max(levels, key=("safe", "low", "medium", "high").index) == "low"


class TestBounds:
    @pytest.mark.parametrize("texts", [("short. ", LONG * 4), (LONG * 4, "short. ")])
    async def test_a_choice_that_ended_holds_no_other_up(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch, texts: tuple[str, str]
    ) -> None:
        monkeypatch.setattr(streaming, "HELD_BYTES", 50_000)
        rig.answers(text(*texts))
        reply = await rig.send(stream=True, n=2)
        assert [said(reply.body, n) for n in range(2)] == [(one, ["stop"]) for one in texts]

    async def test_what_fills_all_room_is_judged_however_far_the_guard_is_behind(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(streaming, "HELD_BYTES", 50_000)
        monkeypatch.setattr(rig.runtime.gateway, "_load", lambda: 1000.0)
        rig.answers(text(LONG * 4))
        reply = await rig.send(stream=True)
        assert said(reply.body) == (LONG * 4, ["stop"])

    async def test_more_streams_than_are_let_in_are_told_to_come_back(
        self, make_rig: MakeRig
    ) -> None:
        async with make_rig(streams=1) as rig:
            rig.answers(text(LONG, stall_after=6000), text("ok"))
            first = await rig.begin(asked())
            with pytest.raises(Overloaded):
                await rig.begin(asked())
            assert first.stream is not None
            await first.stream.aclose()
            await rig.fake.wait_for_disconnect()
            reply = await rig.send(stream=True)
            assert said(reply.body) == ("ok", ["stop"])

    async def test_a_stream_that_nobody_reads_is_cleaned_up_behind(self, make_rig: MakeRig) -> None:
        async with make_rig(streams=1) as rig:
            rig.answers(text(LONG, stall_after=6000))
            reply = await rig.begin(asked())
            assert reply.stream is not None
            await reply.stream.aclose()
            await rig.fake.wait_for_disconnect()
            records = await rig.records()
            assert {r.outcome for r in records if r.direction == "response"} == {"error"}


class TestNeverSilent:
    async def test_a_sign_of_life_comes_while_text_is_held(
        self, rig: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(streaming, "KEEP_ALIVE_SECONDS", 0.05)
        rig.answers(text("hello", delay=0.3))
        reply = await rig.begin(asked())
        body = await whole(reply)
        assert body.startswith(b": ")
        assert said(body) == ("hello", ["stop"])


class TestBadUpstreams:
    @pytest.mark.parametrize(
        "tail",
        [
            b"",
            b"data: {\n\n",
            b'data: {"error":{"message":"x"}}\n\n',
            b"data: [DONE]\n\ndata: [DONE]\n\n",
            b"data: " + b"x" * (2 << 20) + b"\n\n",
        ],
        ids=["no end", "garbage", "an error", "two ends", "a flood"],
    )
    async def test_what_cannot_be_judged_ends_the_stream_with_an_error(
        self, rig: Rig, tail: bytes
    ) -> None:
        choice = {"index": 0, "delta": {"content": LONG}, "finish_reason": None}
        event = b"data: " + dumps({"id": "x", "choices": [choice]}).encode() + b"\n\n"
        rig.answers(Answer(body=event + tail, content_type="text/event-stream"))
        refused: SluicegateError | None = None
        try:
            reply = await asyncio.wait_for(rig.send(stream=True), 10)
        except SluicegateError as error:
            refused = error
        if refused is not None:
            assert refused.status == 502
        else:
            assert b"error" in reply.body
            assert reply.body.endswith(b"data: [DONE]\n\n")
        assert rig.metric("outcomes_total", direction="response", outcome="error") == 1

    async def test_an_upstream_that_does_not_stream_is_streamed(self, rig: Rig) -> None:
        body = {"id": "x", "model": "m", "created": 1, "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}
        ]}  # fmt: skip
        rig.answers(Answer(body=dumps(body).encode()))
        assert said((await rig.send(stream=True)).body) == ("hi", ["stop"])

    async def test_an_error_of_the_upstream_is_passed_unchanged(self, rig: Rig) -> None:
        rig.answers(Answer(body=b'{"error":{"message":"no"}}', status=429))
        reply = await rig.send(stream=True)
        assert (reply.status, reply.body) == (429, b'{"error":{"message":"no"}}')


async def test_a_client_that_goes_away_cancels_everything(rig: Rig) -> None:
    rig.answers(Answer(Completion((Choice(pieces(LONG)),)), pause=0.01))
    reply = await rig.begin(asked())
    assert reply.stream is not None
    await anext(reply.stream.__aiter__())
    await reply.stream.aclose()
    await rig.fake.wait_for_disconnect()
    assert rig.metric("outcomes_total", direction="response", outcome="error") == 1


def test_the_dialect_is_a_chat() -> None:
    assert CHAT.name == "chat"
