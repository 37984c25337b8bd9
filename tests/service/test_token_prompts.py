"""Prompts of token ids, end to end: the upstream's tokenizer gives their text, which is judged."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from service.body import parse_object
from service.caller import Caller
from service.completions import CompletionsDialect
from service.embeddings import EmbeddingsDialect
from service.errors import TooLarge, Unscannable
from service.exchange import Dialect
from service.replies import Incoming, Reply
from service.runtime import Runtime, open_runtime
from service.settings import Settings
from tests.fake_upstream import Answer, FakeUpstream, compact, error
from tests.guards import WordGuard

COMPLETIONS, EMBEDDINGS = CompletionsDialect(), EmbeddingsDialect()
SAFE, BAD, GRAVE = "a fine day", "minor-insulting_behavior here", "severe-violence here"
REFUSAL = "I can't help with that."
ALLOW = """
version: 1
id: allows
rules:
  - {direction: prompt, severity: moderate, action: block}
  - {direction: response, severity: minor, action: regenerate}
  - {action: allow}
unscannable: allow
"""


class Rig:
    """A runtime before a fake upstream."""

    def __init__(self, runtime: Runtime, fake: FakeUpstream) -> None:
        self.runtime = runtime
        self.fake = fake

    async def send(self, body: Any, dialect: Dialect = COMPLETIONS) -> Reply:
        return await self.send_raw(compact({"model": "m", **body}), dialect)

    async def send_raw(self, raw: bytes, dialect: Dialect = COMPLETIONS) -> Reply:
        incoming = Incoming(
            "id1", dialect.path, raw, parse_object(raw), {}, Caller(self.runtime.policies.default)
        )
        return await self.runtime.gateway.handle(dialect, incoming)

    def answers(self, *answers: Answer) -> None:
        self.fake.answers = list(answers)

    @property
    def paths(self) -> list[str]:
        return [received.path for received in self.fake.received]

    def bypasses(self) -> float:
        name = "sluicegate_bypasses_total"
        reason = {"reason": "unscannable"}
        return self.runtime.metrics.registry.get_sample_value(name, reason) or 0.0


MakeRig = Callable[..., AbstractAsyncContextManager[Rig]]


@pytest.fixture
def make_rig(tmp_path: Path) -> MakeRig:
    @asynccontextmanager
    async def make(policy: str | None = None) -> AsyncIterator[Rig]:
        file = None
        if policy is not None:
            file = tmp_path / "policy.yaml"
            file.write_text(policy, "utf-8")
        async with FakeUpstream([]) as fake:
            made = Settings(upstream=fake.url, data_directory=tmp_path / "data", policy=file)
            async with open_runtime(made, WordGuard()) as runtime:
                yield Rig(runtime, fake)

    return make


@pytest.fixture
async def rig(make_rig: MakeRig) -> AsyncIterator[Rig]:
    async with make_rig() as made:
        yield made


def detokenized(text: str) -> Answer:
    """What ``/detokenize`` answers."""
    return Answer(body=compact({"prompt": text}))


def completed(*texts: str) -> Answer:
    """What ``/v1/completions`` answers."""
    choices = [
        {"index": index, "text": text, "logprobs": None, "finish_reason": "stop"}
        for index, text in enumerate(texts)
    ]
    return Answer(body=compact({"id": "x", "object": "text_completion", "choices": choices}))


def texts(reply: Reply) -> list[str]:
    return [choice["text"] for choice in json.loads(reply.body)["choices"]]


def outcome(reply: Reply) -> str:
    return dict(reply.headers)["x-sluicegate-outcome"]


NOT_FOUND = error(404, "Not Found")
VECTORS = Answer(body=compact({"object": "list", "data": [{"index": 0, "embedding": [0.5]}]}))


class TestReadable:
    async def test_a_harmless_prompt_is_forwarded_byte_for_byte(self, rig: Rig) -> None:
        rig.answers(detokenized(SAFE), completed("and more"))
        raw = b'{ "prompt":[ 5,6 ,7], "model":"m" }'
        reply = await rig.send_raw(raw)
        assert rig.paths == ["/detokenize", COMPLETIONS.path]
        asked, forwarded = rig.fake.received
        assert asked.json == {"model": "m", "tokens": [5, 6, 7]}
        assert forwarded.body == raw
        assert (texts(reply), outcome(reply)) == (["and more"], "allowed")
        assert rig.bypasses() == 0

    @pytest.mark.parametrize(
        ("prompt", "read"), [([5, 6], [GRAVE]), ([[5], [6, 7]], [SAFE, GRAVE])]
    )
    async def test_a_harmful_prompt_is_blocked_before_anything_is_generated(
        self, rig: Rig, prompt: Any, read: list[str]
    ) -> None:
        rig.answers(*(detokenized(text) for text in read))
        reply = await rig.send({"prompt": prompt})
        assert (texts(reply), outcome(reply)) == ([REFUSAL] * len(read), "blocked")
        assert COMPLETIONS.path not in rig.paths

    async def test_a_harmful_text_is_blocked_too(self, rig: Rig) -> None:
        reply = await rig.send({"prompt": [SAFE, GRAVE]})
        assert (outcome(reply), rig.paths) == ("blocked", [])

    async def test_only_the_prompt_of_the_flagged_choice_is_asked_again(self, rig: Rig) -> None:
        rig.answers(detokenized("one"), detokenized("two"), completed("x", BAD), completed("y"))
        reply = await rig.send({"prompt": [[5], [6, 7]], "seed": 3})
        assert (texts(reply), outcome(reply)) == (["x", "y"], "regenerated")
        again = rig.fake.received[-1].json
        assert again == {"model": "m", "prompt": [[6, 7]], "seed": 4, "n": 1}

    async def test_a_harmful_input_is_not_embedded(self, rig: Rig) -> None:
        rig.answers(detokenized(GRAVE))
        reply = await rig.send({"input": [5, 6]}, EMBEDDINGS)
        assert (reply.status, json.loads(reply.body)["error"]["code"]) == (400, "content_filter")
        assert rig.paths == ["/detokenize"]

    async def test_a_harmless_input_is_embedded(self, rig: Rig) -> None:
        rig.answers(detokenized(SAFE), VECTORS)
        reply = await rig.send({"input": [5, 6]}, EMBEDDINGS)
        assert (reply.body, outcome(reply)) == (VECTORS.body, "allowed")
        assert rig.paths == ["/detokenize", EMBEDDINGS.path]

    async def test_so_many_at_once_are_refused_before_any_is_read(self, rig: Rig) -> None:
        with pytest.raises(TooLarge):
            await rig.send({"prompt": [[5]] * 65})
        assert rig.paths == []


class TestUnreadable:
    @pytest.mark.parametrize("answer", [NOT_FOUND, Answer(body=b"{}"), Answer(body=b"<html>")])
    async def test_without_a_text_a_prompt_is_not_forwarded(self, rig: Rig, answer: Answer) -> None:
        rig.answers(answer)
        with pytest.raises(Unscannable) as caught:
            await rig.send({"prompt": [5, 6]})
        assert (caught.value.status, caught.value.code) == (400, "unscannable")
        assert caught.value.param == "prompt"
        assert rig.paths == ["/detokenize"]

    async def test_the_one_of_several_is_named(self, rig: Rig) -> None:
        rig.answers(detokenized(SAFE), NOT_FOUND)
        with pytest.raises(Unscannable) as caught:
            await rig.send({"input": [[5], [6]]}, EMBEDDINGS)
        assert caught.value.param == "input[1]"
        assert EMBEDDINGS.path not in rig.paths

    async def test_where_the_policy_allows_it_passes_and_is_counted(
        self, make_rig: MakeRig
    ) -> None:
        async with make_rig(ALLOW) as rig:
            rig.answers(NOT_FOUND, completed("and more"))
            reply = await rig.send({"prompt": [5, 6]})
            assert (texts(reply), outcome(reply)) == (["and more"], "bypassed")
            assert rig.bypasses() == 1

    async def test_what_can_be_read_beside_it_is_judged_all_the_same(
        self, make_rig: MakeRig
    ) -> None:
        async with make_rig(ALLOW) as rig:
            rig.answers(NOT_FOUND, detokenized(GRAVE))
            assert outcome(await rig.send({"prompt": [[5], [6]]})) == "blocked"
            assert COMPLETIONS.path not in rig.paths

    async def test_its_answer_is_judged_all_the_same(self, make_rig: MakeRig) -> None:
        async with make_rig(ALLOW) as rig:
            rig.answers(NOT_FOUND, *[completed(BAD)] * 6)
            reply = await rig.send({"prompt": [5, 6]})
            assert (texts(reply), outcome(reply)) == ([REFUSAL], "blocked")
