"""The fake speaks as vLLM does, so that what passes before it passes before vLLM."""

import asyncio
import json
import subprocess
import sys
from typing import Any

import pytest

from service.sse import EventParser
from tests.fake_upstream import (
    Choice,
    Completion,
    FakeUpstream,
    ToolCall,
    events,
    text,
    tools,
    whole,
)
from tests.service.test_upstream import BODY, CHAT, JSON, ROOT, client, post, stream

FIXTURES = ROOT / "tests" / "fixtures" / "vllm"


class TestFake:
    def test_a_whole_answer(self) -> None:
        recorded = (FIXTURES / "chat.json").read_bytes()
        answer = json.loads(recorded)
        completion = recorded_completion(answer, (answer["choices"][0]["message"]["content"],))

        assert whole(completion) == recorded

    @pytest.mark.parametrize("name", ["stream", "stream_usage"])
    def test_a_stream(self, name: str) -> None:
        recorded = (FIXTURES / f"{name}.sse").read_bytes()
        chunks = [json.loads(event.data) for event in EventParser().feed(recorded)[:-1]]
        contents = [c["choices"][0]["delta"]["content"] for c in chunks if c["choices"]]
        completion = recorded_completion(chunks[0], tuple(contents[1:-1]))

        assert b"".join(events(completion, usage=name == "stream_usage")) == recorded

    async def test_choices_reasoning_and_tools(self) -> None:
        answers = [text("One.", "Two.", reasoning="Hm."), tools(ToolCall("f", '{"a": 1}'))]
        async with FakeUpstream(answers) as fake, client(fake.url) as upstream:
            two, called = [json.loads(await post(upstream)) for _ in range(2)]
            missing = await upstream.post(CHAT, BODY, JSON)

        assert [c["message"]["content"] for c in two["choices"]] == ["One.", "Two."]
        assert two["choices"][1]["message"]["reasoning"] == "Hm."
        assert called["choices"][0]["finish_reason"] == "tool_calls"
        message = called["choices"][0]["message"]
        assert message["content"] is None
        assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": 1}'}
        assert missing.status == 500

    async def test_the_one_for_benchmarks(self) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.fake_upstream"), cwd=ROOT, stdout=subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            url = (await process.stdout.readline()).decode().strip()
            async with client(url) as upstream:
                answers = [await call(upstream) for call in (post, stream, post)]
        finally:
            process.terminate()
            await process.wait()

        assert json.loads(answers[0])["choices"][0]["message"]["content"]
        assert EventParser().feed(answers[1])[-1].data == "[DONE]"
        assert answers[2] == answers[0]


def recorded_completion(answer: dict[str, Any], pieces: tuple[str, ...]) -> Completion:
    return Completion((Choice(pieces),), answer["id"], answer["created"], answer["model"])
