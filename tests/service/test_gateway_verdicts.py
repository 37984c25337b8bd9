"""What a client asks to be told, what may not be scanned, and what is judged only once."""

import json
from dataclasses import replace
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from models.inputs import GuardInput, Windows
from service.errors import TooLarge, Unscannable, UpstreamMalformed
from service.policy import Policy, RefusalText
from tests.fake_upstream import Answer, text
from tests.guards import WordGuard
from tests.service.rig import (
    BAD,
    CHAT,
    GRAVE,
    REFUSAL,
    SAFE,
    MakeRig,
    Rig,
    content,
    shown,
)

SCORE: dict[str, Any] = {"model": "omni-moderation-latest"}


def user(words: Any) -> dict[str, Any]:
    return {"role": "user", "content": words}


def chunks(body: bytes) -> list[ChatCompletionChunk]:
    events = [line[6:] for line in body.decode().splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    return [ChatCompletionChunk.model_validate_json(event) for event in events]


class TestOpenAIsModeration:
    async def test_verdicts_stand_beside_an_answer_that_is_otherwise_the_upstreams(
        self, rig: Rig
    ) -> None:
        rig.answers(text("hello", "hello you"), text("hello", "hello you"))
        asked = json.loads((await rig.send(BAD, n=2, moderation=SCORE)).body)
        plain = json.loads((await rig.send(BAD, n=2)).body)
        parsed = ChatCompletion.model_validate(asked)
        assert parsed.moderation is not None
        assert parsed.moderation.input.type == parsed.moderation.output.type == "moderation_results"
        (given,) = parsed.moderation.input.results
        assert (given.flagged, given.model) == (True, "words-1")
        assert [result.flagged for result in parsed.moderation.output.results] == [False, False]
        assert asked["moderation"]["input"]["results"][0]["severity"] == "minor"
        del asked["moderation"]
        assert asked == plain

    @pytest.mark.parametrize(
        ("policy", "prompt", "answer", "outcome"),
        [
            ({"input": {"mode": "block"}}, BAD, "hello", "blocked"),
            ({"input": {"mode": "score"}}, BAD, "hello", "annotated"),
            ({"input": {"mode": "block"}}, SAFE, "hello", "allowed"),
            ({"output": {"mode": "block"}}, SAFE, BAD, "blocked"),
            ({"output": {"mode": "score"}}, SAFE, BAD, "annotated"),
        ],
    )
    async def test_a_client_may_ask_for_more_but_not_for_less(
        self, make_rig: MakeRig, policy: Any, prompt: str, answer: str, outcome: str
    ) -> None:
        lax = {"rules": [{"severity": "minor", "action": "annotate"}, {"action": "allow"}]}
        async with make_rig(Policy.model_validate(lax)) as rig:
            rig.answers(text(answer))
            reply = await rig.send(prompt, moderation={"policy": policy})
            assert shown(reply)[0] == outcome

    async def test_scores_do_not_loosen_what_the_policy_blocks(self, rig: Rig) -> None:
        reply = await rig.send(GRAVE, moderation={"policy": {"input": {"mode": "score"}}})
        body = ChatCompletion.model_validate_json(reply.body)
        assert body.choices[0].message.content == REFUSAL
        assert body.moderation is not None
        assert body.moderation.output.type == "error"
        assert body.moderation.output.code == "not_generated"

    async def test_a_stream_tells_them_in_one_chunk_without_text(self, rig: Rig) -> None:
        rig.answers(text("hello"), text("hello"))
        plain = (await rig.send(stream=True)).body
        asked = (await rig.send(stream=True, moderation=SCORE)).body
        *before, told = chunks(asked)
        assert before == chunks(plain)
        assert told.moderation is not None
        assert told.choices == []

    async def test_a_refused_stream_tells_them_too(self, rig: Rig) -> None:
        *_, told = chunks((await rig.send(GRAVE, stream=True, moderation=SCORE)).body)
        assert told.moderation is not None


class TestAzuresAnnotations:
    async def test_each_choice_and_the_prompt_have_severities(self, rig: Rig) -> None:
        rig.answers(text("fine", "severe-violence"), *[text("severe-violence")] * 5)
        reply = await rig.ask(CHAT, {"messages": [user(BAD)], "n": 2}, wants_azure=True)
        body = json.loads(reply.body)
        prompt = body["prompt_filter_results"][0]["content_filter_results"]
        assert prompt["hate"] == {"filtered": False, "severity": "low"}
        assert prompt["jailbreak"] == {"filtered": False, "detected": False}
        first, second = (choice["content_filter_results"] for choice in body["choices"])
        assert first["violence"] == {"filtered": False, "severity": "safe"}
        assert second["violence"] == {"filtered": True, "severity": "high"}

    async def test_a_blocked_prompt_may_be_an_error_as_azure_has_it(
        self, make_rig: MakeRig
    ) -> None:
        async with make_rig(Policy(refusal=RefusalText(status=400))) as rig:
            reply = await rig.send(GRAVE)
            error = json.loads(reply.body)["error"]
            assert (reply.status, error["code"], error["param"]) == (
                400,
                "content_filter",
                "prompt",
            )
            inner = error["innererror"]
            assert inner["code"] == "ResponsibleAIPolicyViolation"
            violence = inner["content_filter_result"]["violence"]
            assert violence == {"filtered": True, "severity": "high"}
            assert rig.metric("outcomes_total", direction="prompt", outcome="blocked") == 1
            # An answer that was withheld is a message all the same.
            rig.answers(*[text(BAD)] * 6)
            assert content(await rig.send()) == REFUSAL


class TestHeaders:
    async def test_severities_are_told_by_direction(self, rig: Rig) -> None:
        rig.answers(text(BAD), text("better"))
        told = dict((await rig.send(BAD)).headers)
        assert told["x-sluicegate-prompt-severity"] == "minor"
        assert told["x-sluicegate-response-severity"] == "none"
        told = dict((await rig.send(GRAVE)).headers)
        assert told["x-sluicegate-prompt-severity"] == "severe"
        assert "x-sluicegate-response-severity" not in told


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


class TestUnscannable:
    async def test_it_is_refused_by_name_and_counted(self, rig: Rig) -> None:
        with pytest.raises(Unscannable) as caught:
            await rig.send(messages=[user([{"type": "text", "text": SAFE}, IMAGE])])
        assert caught.value.param == "messages[0].content[1]"
        assert rig.fake.received == []
        assert rig.metric("outcomes_total", direction="prompt", outcome="blocked") == 1

    async def test_a_policy_may_let_it_pass_and_it_is_never_counted_as_judged(
        self, make_rig: MakeRig
    ) -> None:
        async with make_rig(Policy(unscannable="allow")) as rig:
            rig.answers(text("hello"))
            reply = await rig.send(messages=[user([IMAGE])])
            assert shown(reply) == ("bypassed", "1")
            assert rig.metric("bypasses_total", reason="unscannable") == 1
            assert rig.metric("outcomes_total", direction="prompt", outcome="bypassed") == 1
            # The words beside it are judged all the same.
            reply = await rig.send(messages=[user([{"type": "text", "text": GRAVE}, IMAGE])])
            assert shown(reply) == ("blocked", "0")

    @pytest.mark.parametrize(
        "body",
        [
            b'{"choices":[{"index":0,"message":{"audio":{"id":"a","data":"AAAA"}}}]}',
            b'{"choices":"none"}',
            b"not json",
        ],
    )
    async def test_an_answer_that_cannot_be_scanned(self, make_rig: MakeRig, body: bytes) -> None:
        async with make_rig() as rig:
            rig.answers(Answer(body=body))
            with pytest.raises(UpstreamMalformed):
                await rig.send()
        async with make_rig(Policy(unscannable="allow")) as rig:
            rig.answers(Answer(body=body))
            reply = await rig.send()
            assert (reply.body, shown(reply)[0]) == (body, "bypassed")
            assert rig.metric("bypasses_total", reason="unscannable") == 1


class TestJudgedOnce:
    async def test_what_a_conversation_said_before_costs_nothing(self, rig: Rig) -> None:
        history = [{"role": "system", "content": "be kind"}, user("one")]
        rig.answers(text("two"), text("four"))
        first = await rig.send(messages=history)
        judged = rig.metric("guard_batch_rows_sum")
        history += [{"role": "assistant", "content": content(first)}, user("three")]
        await rig.send(messages=history)
        # The new turn, by itself and with the one before, and its answer.
        assert rig.metric("guard_batch_rows_sum") == judged + 3
        assert rig.metric("cache_requests_total", tier="local", result="hit") == 3

    async def test_a_flagged_turn_that_was_answered_does_not_block_for_ever(self, rig: Rig) -> None:
        history = [user(GRAVE), {"role": "assistant", "content": REFUSAL}, user("sorry")]
        rig.answers(text("no harm done"))
        reply = await rig.send(messages=history)
        assert (content(reply), shown(reply)[0]) == ("no harm done", "annotated")

    async def test_more_fields_than_one_request_may_hold(self, make_rig: MakeRig) -> None:
        async with make_rig(fields_per_request=3) as rig:
            with pytest.raises(TooLarge) as caught:
                await rig.send(messages=[user(str(n)) for n in range(4)])
            assert caught.value.code == "too_many_fields"


class TestSensitivity:
    @pytest.mark.parametrize(
        ("words", "outcome"),
        [("moderate-violence", "annotated"), ("severe-violence", "blocked")],
    )
    async def test_a_tools_definition_is_not_judged_as_a_users_words(
        self, rig: Rig, words: str, outcome: str
    ) -> None:
        rig.answers(text("hello"))
        tool = {"type": "function", "function": {"name": "kill", "description": words}}
        assert shown(await rig.send(tools=[tool]))[0] == outcome

    async def test_a_users_words_are(self, rig: Rig) -> None:
        assert shown(await rig.send("moderate-violence"))[0] == "blocked"


class SplitGuard(WordGuard):
    """Knows an attack only where both of its halves stand in one text."""

    def prepare(self, item: GuardInput) -> Windows:
        is_whole = "first half" in item.text and "second half" in item.text
        return super().prepare(replace(item, text="severe-violence") if is_whole else item)


class TestSplitAttacks:
    TURNS = (
        user("first half"),
        {"role": "assistant", "content": "go on"},
        user("second half"),
    )

    async def test_an_attack_that_is_split_over_turns_is_seen(self, make_rig: MakeRig) -> None:
        async with make_rig(guard=SplitGuard()) as rig:
            assert shown(await rig.send(messages=[*self.TURNS])) == ("blocked", "0")

    async def test_but_what_was_flagged_and_answered_before_does_not_come_back_through_it(
        self, make_rig: MakeRig
    ) -> None:
        later = [*self.TURNS, {"role": "assistant", "content": REFUSAL}, user("thanks")]
        later[2] = user("first half, second half")
        async with make_rig(guard=SplitGuard()) as rig:
            rig.answers(text("you are welcome"))
            assert shown(await rig.send(messages=later))[0] == "annotated"
