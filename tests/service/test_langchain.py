"""LangChain's chat model before a real server and a fake upstream."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessageChunk
from langchain_openai import ChatOpenAI
from langchain_openai.chat_models.base import OpenAIRefusalError
from pydantic import BaseModel

from service import responses_stream
from tests.fake_upstream import Answer, FakeUpstream, ToolCall, compact, text, tools
from tests.service.conftest import Server, StartServer
from tests.service.rig import BAD, GRAVE, REFUSAL, SAFE
from tests.service.test_responses import response, said


class Letter(BaseModel):
    """A letter to send."""

    text: str


Connect = Callable[..., ChatOpenAI]


@pytest.fixture(autouse=True, scope="module")
def untraced() -> Iterator[None]:
    """LangSmith would be told of every call, by whatever the developer's environment says."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2"):
            patch.setenv(name, "false")
        yield


@pytest.fixture(scope="module")
def connect() -> Iterator[Connect]:
    """Makes chat models as a user configures them."""
    with openai.DefaultHttpxClient(trust_env=False) as client:

        def made(server: Server, **options: Any) -> ChatOpenAI:
            given: dict[str, Any] = {
                "model": "m",
                "base_url": f"{server.url}/v1",
                "api_key": "unused",
                "max_retries": 0,
                "timeout": 20,
                "http_client": client,
            }
            return ChatOpenAI(**given, **options)

        yield made


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    return start_server(upstream=FakeUpstream())


@pytest.fixture(scope="module")
def chat(server: Server, connect: Connect) -> ChatOpenAI:
    return connect(server)


@pytest.fixture
def upstream(server: Server) -> FakeUpstream:
    assert server.upstream is not None
    server.upstream.received.clear()
    return server.upstream


@pytest.fixture(scope="module")
def failing(start_server: StartServer, connect: Connect) -> ChatOpenAI:
    """A model whose blocked prompts are an error, as Azure's are."""
    policy = {
        "version": 1,
        "id": "azure",
        "rules": [{"severity": "moderate", "action": "block"}, {"action": "allow"}],
        "refusal": {"status": 400},
    }
    return connect(start_server(policy=policy, upstream=FakeUpstream()))


@pytest.mark.parametrize(
    ("prompt", "answers", "read"),
    [
        (SAFE, [text(SAFE)], SAFE),
        (GRAVE, [], REFUSAL),
        (SAFE, [text(BAD), text("better")], "better"),
        (SAFE, [text(GRAVE)] * 6, REFUSAL),
    ],
    ids=["safe", "blocked prompt", "regenerated", "blocked answer"],
)
def test_a_message_and_a_stream(
    chat: ChatOpenAI, upstream: FakeUpstream, prompt: str, answers: list[Answer], read: str
) -> None:
    upstream.answers = [*answers, *answers]
    found = chat.invoke(prompt)
    assert (found.text, found.response_metadata["finish_reason"]) == (read, "stop")
    whole = AIMessageChunk(content="")
    for chunk in chat.stream(prompt):
        assert isinstance(chunk, AIMessageChunk)
        whole += chunk
    assert whole.text == read
    assert len(upstream.received) >= 2 * len(answers)


@pytest.mark.parametrize("prompt", [SAFE, GRAVE])
def test_a_refusal_of_structured_output_is_an_error_of_its_own(
    chat: ChatOpenAI, upstream: FakeUpstream, prompt: str
) -> None:
    upstream.answers = [text('{"text":"hello"}')]
    model = chat.with_structured_output(Letter)
    assert model.invoke(SAFE) == Letter(text="hello")
    upstream.answers = [text(json.dumps({"text": GRAVE}))] * 6
    with pytest.raises(OpenAIRefusalError, match=REFUSAL):
        model.invoke(prompt)


def test_a_refusal_where_output_is_structured_by_a_tool_is_no_object(
    chat: ChatOpenAI, upstream: FakeUpstream
) -> None:
    model = chat.with_structured_output(Letter, method="function_calling")
    assert model.invoke(GRAVE) is None
    assert upstream.received == []


def test_a_harmful_tool_call_is_generated_again(chat: ChatOpenAI, upstream: FakeUpstream) -> None:
    calls = [ToolCall("Letter", json.dumps({"text": said})) for said in (BAD, "hello")]
    upstream.answers = [tools(call) for call in calls]
    (call,) = chat.bind_tools([Letter]).invoke(SAFE).tool_calls
    assert (call["name"], call["args"]) == ("Letter", {"text": "hello"})
    assert len(upstream.received) == 2


def test_a_blocked_prompt_can_be_an_error(failing: ChatOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        failing.invoke(GRAVE)
    assert caught.value.code == "content_filter"
    with pytest.raises(openai.BadRequestError):
        list(failing.stream(GRAVE))


def test_responses(server: Server, connect: Connect, upstream: FakeUpstream) -> None:
    chat = connect(server, use_responses_api=True, use_previous_response_id=True)
    upstream.answers = [
        Answer(body=compact(response(said(BAD), id="resp_bad"))),
        Answer(body=compact(response(said("better"), id="resp_better"))),
        Answer(
            body=responses_stream.encoded(response(said("fine"), id="resp_fine")),
            content_type="text/event-stream",
        ),
    ]
    first = chat.invoke("one")
    assert first.text == "better"
    turns: list[Any] = [("user", "one"), first, ("user", "two")]
    assert "".join(chunk.text for chunk in chat.stream(turns)) == "fine"
    sent = upstream.received[2]
    assert BAD.encode() not in sent.body
    assert [item["role"] for item in sent.json["input"]] == ["user", "assistant", "user"]
    assert chat.invoke(GRAVE).text == REFUSAL
