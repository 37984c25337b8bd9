"""OpenAI's own client before a real server and a fake upstream, on every path."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion
from openai.types.responses import ResponseOutputRefusal
from pydantic import BaseModel

from service import responses_stream
from tests.fake_upstream import (
    Answer,
    FakeUpstream,
    Received,
    ToolCall,
    compact,
    error,
    text,
    tools,
)
from tests.guards import CANARY, SlowGuard
from tests.service.conftest import Server, StartServer
from tests.service.rig import BAD, GRAVE, REFUSAL, SAFE
from tests.service.test_responses import call, response, said

POLICY = {
    "version": 1,
    "id": "sdk",
    "rules": [
        {"severity": "moderate", "action": "block"},
        {"direction": "response", "severity": "minor", "action": "regenerate"},
        {"action": "allow"},
    ],
}
MODERATION: Any = {"model": "omni-moderation-latest"}
BLOCKING: Any = {**MODERATION, "policy": {"input": {"mode": "block"}}}


class Weather(BaseModel):
    sky: str


class Letter(BaseModel):
    text: str


LETTER = openai.pydantic_function_tool(Letter)
WRITTEN = '{"text":"hello"}'
HARMFUL = json.dumps({"text": BAD})


def completion(*texts: str) -> Answer:
    """An answer of ``/v1/completions``."""
    choices = [
        {"index": index, "text": said, "logprobs": None, "finish_reason": "stop"}
        for index, said in enumerate(texts)
    ]
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    return Answer(
        body=compact(
            {"id": "cmpl-1", "object": "text_completion", "created": 7, "model": "m"}
            | {"choices": choices, "usage": usage}
        )
    )


def events(body: dict[str, Any]) -> Answer:
    """A response as the stream of an upstream."""
    return Answer(body=responses_stream.encoded(body), content_type="text/event-stream")


def whole(*output: dict[str, Any], **more: Any) -> Answer:
    return Answer(body=compact(response(*output, **more)))


Connect = Callable[[Server], openai.OpenAI]


@pytest.fixture(scope="module")
def connect() -> Iterator[Connect]:
    """Makes stock clients, as a user configures them."""
    with ExitStack() as stack:

        def made(server: Server) -> openai.OpenAI:
            client = openai.OpenAI(
                base_url=f"{server.url}/v1",
                api_key="unused",
                max_retries=0,
                timeout=20,
                http_client=openai.DefaultHttpxClient(trust_env=False),
            )
            return stack.enter_context(client)

        yield made


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    return start_server(policy=POLICY, upstream=FakeUpstream())


@pytest.fixture(scope="module")
def sdk(server: Server, connect: Connect) -> openai.OpenAI:
    return connect(server)


@pytest.fixture
def upstream(server: Server) -> FakeUpstream:
    assert server.upstream is not None
    server.upstream.received.clear()
    server.upstream.disconnected.clear()
    return server.upstream


@pytest.fixture(scope="module")
def filtering(start_server: StartServer, connect: Connect) -> openai.OpenAI:
    """A client of a server that refuses by ``finish_reason``."""
    policy = POLICY | {"refusal": {"finish_reason": "content_filter"}}
    return connect(start_server(policy=policy, upstream=FakeUpstream(text(GRAVE))))


@pytest.fixture(scope="module")
def failing(start_server: StartServer, connect: Connect) -> openai.OpenAI:
    """A client of a server that refuses by status, as Azure does."""
    policy = POLICY | {"refusal": {"status": 400}}
    return connect(start_server(policy=policy, upstream=FakeUpstream(text(GRAVE))))


def asked(prompt: str = SAFE, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": prompt}], **more}


def detail(caught: pytest.ExceptionInfo[openai.APIStatusError]) -> dict[str, Any]:
    """The error in an exception, as the client parsed it."""
    assert isinstance(caught.value.body, dict)
    return caught.value.body


class TestChat:
    def test_a_safe_answer_byte_for_byte(self, sdk: openai.OpenAI, upstream: FakeUpstream) -> None:
        # Spaces that no serializer of ours would put there.
        found = {"index": 0, "message": {"role": "assistant", "content": SAFE}}
        raw = json.dumps({"id": "1", "choices": [found | {"finish_reason": "stop"}]}, indent=1)
        upstream.answers = [Answer(body=raw.encode())]
        answered = sdk.chat.completions.with_raw_response.create(**asked())
        assert answered.http_response.text == raw
        assert answered.parse().choices[0].message.content == SAFE
        assert answered.headers["x-sluicegate-outcome"] == "allowed"

    def test_a_blocked_prompt(self, sdk: openai.OpenAI, upstream: FakeUpstream) -> None:
        found = sdk.chat.completions.create(**asked(GRAVE, n=2))
        ChatCompletion.model_validate(found.to_dict(), strict=True)
        for choice in found.choices:
            assert (choice.message.content, choice.message.refusal) == (REFUSAL, None)
            assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
        assert [choice.index for choice in found.choices] == [0, 1]
        assert found.usage is not None
        assert found.usage.total_tokens == 0
        assert upstream.received == []

    def test_a_blocked_answer(self, sdk: openai.OpenAI, upstream: FakeUpstream) -> None:
        upstream.answers = [text(GRAVE, reasoning=GRAVE)]
        found = sdk.chat.completions.create(**asked())
        assert found.choices[0].message.content == REFUSAL
        assert GRAVE not in found.to_json()

    @pytest.mark.parametrize(
        ("prompt", "answers", "read"),
        [
            (SAFE, [text(SAFE)], SAFE),
            (GRAVE, [], REFUSAL),
            (SAFE, [text(GRAVE)], REFUSAL),
            (SAFE, [text(BAD), text("better")], "better"),
        ],
        ids=["safe", "blocked prompt", "blocked answer", "regenerated"],
    )
    def test_streams(
        self,
        sdk: openai.OpenAI,
        upstream: FakeUpstream,
        prompt: str,
        answers: list[Answer],
        read: str,
    ) -> None:
        upstream.answers = [*answers, *answers]
        options: Any = {"stream_options": {"include_usage": True}}
        chunks = list(sdk.chat.completions.create(**asked(prompt, stream=True), **options))
        deltas = [choice for chunk in chunks for choice in chunk.choices]
        assert "".join(choice.delta.content or "" for choice in deltas) == read
        assert [choice.finish_reason for choice in deltas if choice.finish_reason] == ["stop"]
        assert chunks[-1].usage is not None
        with sdk.chat.completions.stream(**asked(prompt)) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_completion()
        assert final.choices[0].message.content == read
        assert kinds[-1] == "content.done"
        assert len(upstream.received) >= 2 * len(answers)

    def test_a_parser_gets_what_is_safe(self, sdk: openai.OpenAI, upstream: FakeUpstream) -> None:
        upstream.answers = [text('{"sky":"blue"}')]
        found = sdk.chat.completions.parse(**asked(response_format=Weather))
        assert found.choices[0].message.parsed == Weather(sky="blue")

    @pytest.mark.parametrize("prompt", [SAFE, GRAVE])
    def test_parsers_survive_a_refusal(
        self, sdk: openai.OpenAI, upstream: FakeUpstream, prompt: str
    ) -> None:
        upstream.answers = [text(json.dumps({"sky": GRAVE}))] * 2
        found = sdk.chat.completions.parse(**asked(prompt, response_format=Weather))
        with sdk.chat.completions.stream(**asked(prompt, response_format=Weather)) as stream:
            kinds = [event.type for event in stream]
            streamed = stream.get_final_completion()
        for message in (found.choices[0].message, streamed.choices[0].message):
            assert (message.parsed, message.refusal) == (None, REFUSAL)
            assert not message.content
        assert "refusal.done" in kinds

    def test_choices_are_judged_one_by_one(
        self, sdk: openai.OpenAI, upstream: FakeUpstream
    ) -> None:
        upstream.answers = [text("one", BAD, GRAVE), text("two")]
        found = sdk.chat.completions.create(**asked(n=3))
        assert [choice.message.content for choice in found.choices] == ["one", "two", REFUSAL]
        assert [choice.index for choice in found.choices] == [0, 1, 2]
        assert [received.json["n"] for received in upstream.received] == [3, 1]

    def test_choices_of_a_stream_too(self, sdk: openai.OpenAI, upstream: FakeUpstream) -> None:
        upstream.answers = [text("one", BAD, GRAVE), text("two")]
        with sdk.chat.completions.stream(**asked(n=3)) as stream:
            stream.until_done()
            final = stream.get_final_completion()
        assert [choice.message.content for choice in final.choices] == ["one", "two", REFUSAL]


class TestTools:
    def test_a_safe_call_is_parsed(self, sdk: openai.OpenAI, upstream: FakeUpstream) -> None:
        upstream.answers = [tools(ToolCall("Letter", WRITTEN))] * 2
        found = sdk.chat.completions.parse(**asked(tools=[LETTER]))
        with sdk.chat.completions.stream(**asked(tools=[LETTER])) as stream:
            streamed = stream.get_final_completion()
        for choice in (found.choices[0], streamed.choices[0]):
            (made,) = choice.message.tool_calls or []
            assert made.type == "function"
            assert made.function.parsed_arguments == Letter(text="hello")
            assert choice.finish_reason == "tool_calls"

    @pytest.mark.parametrize("streams", [False, True])
    def test_a_harmful_call_is_generated_again(
        self, sdk: openai.OpenAI, upstream: FakeUpstream, streams: bool
    ) -> None:
        upstream.answers = [tools(ToolCall("Letter", said)) for said in (HARMFUL, WRITTEN)]
        if streams:
            with sdk.chat.completions.stream(**asked(tools=[LETTER])) as stream:
                found = stream.get_final_completion()
        else:
            found = sdk.chat.completions.parse(**asked(tools=[LETTER]))
        (made,) = found.choices[0].message.tool_calls or []
        assert made.type == "function"
        assert made.function.parsed_arguments == Letter(text="hello")
        assert len(upstream.received) == 2

    def test_a_blocked_call_leaves_no_call(
        self, sdk: openai.OpenAI, upstream: FakeUpstream
    ) -> None:
        upstream.answers = [tools(ToolCall("Letter", json.dumps({"text": GRAVE})))]
        (choice,) = sdk.chat.completions.parse(**asked(tools=[LETTER])).choices
        assert (choice.message.content, choice.message.tool_calls) == (REFUSAL, None)
        assert choice.finish_reason == "stop"

    def test_a_harmful_result_is_a_blocked_prompt(
        self, sdk: openai.OpenAI, upstream: FakeUpstream
    ) -> None:
        made = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        turns: Any = [
            {"role": "user", "content": SAFE},
            {"role": "assistant", "tool_calls": [made]},
            {"role": "tool", "tool_call_id": "1", "content": GRAVE},
        ]
        found = sdk.chat.completions.create(model="m", messages=turns)
        assert found.choices[0].message.content == REFUSAL
        assert upstream.received == []


class TestRefusalsByFinishReason:
    @pytest.mark.parametrize("prompt", [SAFE, GRAVE])
    def test_a_plain_answer_says_so(self, filtering: openai.OpenAI, prompt: str) -> None:
        (choice,) = filtering.chat.completions.create(**asked(prompt)).choices
        assert (choice.message.content, choice.finish_reason) == (REFUSAL, "content_filter")

    @pytest.mark.parametrize("prompt", [SAFE, GRAVE])
    def test_parsers_raise_their_own_error(self, filtering: openai.OpenAI, prompt: str) -> None:
        with pytest.raises(openai.ContentFilterFinishReasonError):
            filtering.chat.completions.parse(**asked(prompt, response_format=Weather))
        with (
            pytest.raises(openai.ContentFilterFinishReasonError),
            filtering.chat.completions.stream(**asked(prompt, response_format=Weather)) as stream,
        ):
            stream.until_done()

    def test_a_response_is_incomplete(self, filtering: openai.OpenAI) -> None:
        found = filtering.responses.create(model="m", input=GRAVE)
        assert (found.status, found.output_text) == ("incomplete", REFUSAL)
        assert found.incomplete_details is not None
        assert found.incomplete_details.reason == "content_filter"
        with filtering.responses.stream(model="m", input=GRAVE) as stream:
            kinds = [event.type for event in stream]
        assert kinds[-1] == "response.incomplete"


class TestRefusalsByStatus:
    @pytest.mark.parametrize(
        "ask",
        [
            lambda sdk: sdk.chat.completions.create(**asked(GRAVE)),
            lambda sdk: sdk.chat.completions.create(**asked(GRAVE), stream=True),
            lambda sdk: sdk.chat.completions.parse(**asked(GRAVE, response_format=Weather)),
            lambda sdk: sdk.completions.create(model="m", prompt=GRAVE),
            lambda sdk: sdk.responses.create(model="m", input=GRAVE),
        ],
        ids=["chat", "stream", "parse", "completion", "response"],
    )
    def test_of_a_prompt(self, failing: openai.OpenAI, ask: Callable[[openai.OpenAI], Any]) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            ask(failing)
        assert (caught.value.code, caught.value.param) == ("content_filter", "prompt")
        inner = detail(caught)["innererror"]
        assert inner["code"] == "ResponsibleAIPolicyViolation"
        violence = {"filtered": True, "severity": "high"}
        assert inner["content_filter_result"]["violence"] == violence
        assert caught.value.response.headers["x-sluicegate-outcome"] == "blocked"
        assert GRAVE not in caught.value.response.text

    def test_an_answer_is_refused_by_a_message(self, failing: openai.OpenAI) -> None:
        (choice,) = failing.chat.completions.create(**asked()).choices
        assert (choice.message.content, choice.finish_reason) == (REFUSAL, "stop")


class TestModeration:
    def test_stands_typed_beside_a_chat(self, sdk: openai.OpenAI, upstream: FakeUpstream) -> None:
        upstream.answers = [text(SAFE)]
        prompt = "minor-insulting_behavior"
        told = sdk.chat.completions.create(**asked(prompt), moderation=MODERATION).moderation
        assert told is not None
        assert told.input.type == told.output.type == "moderation_results"
        assert told.input.results[0].flagged
        assert not told.output.results[0].flagged
        assert told.input.model == "words-1"
        assert "moderation" not in upstream.received[0].json

    @pytest.mark.parametrize("prompt", [SAFE, GRAVE])
    def test_comes_in_a_chunk_of_its_own(
        self, sdk: openai.OpenAI, upstream: FakeUpstream, prompt: str
    ) -> None:
        upstream.answers = [text(SAFE)] * 2
        chunks = list(
            sdk.chat.completions.create(**asked(prompt), stream=True, moderation=MODERATION)
        )
        (chunk,) = [chunk for chunk in chunks if chunk.moderation is not None]
        assert (chunk, chunk.choices) == (chunks[-1], [])
        assert chunk.moderation is not None
        assert chunk.moderation.input.type == "moderation_results"
        assert chunk.moderation.input.results[0].flagged is (prompt == GRAVE)
        kind = "error" if prompt == GRAVE else "moderation_results"
        assert chunk.moderation.output.type == kind
        with sdk.chat.completions.stream(**asked(prompt), moderation=MODERATION) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].message.content == (REFUSAL if prompt == GRAVE else SAFE)

    def test_only_tightens(self, sdk: openai.OpenAI, upstream: FakeUpstream) -> None:
        found = sdk.chat.completions.create(
            **asked("minor-insulting_behavior"), moderation=BLOCKING
        )
        assert found.choices[0].message.content == REFUSAL
        loose: Any = {**MODERATION, "policy": {"input": {"mode": "score"}}}
        found = sdk.chat.completions.create(**asked(GRAVE), moderation=loose)
        assert found.choices[0].message.content == REFUSAL
        assert upstream.received == []

    def test_stands_typed_beside_a_response(
        self, sdk: openai.OpenAI, upstream: FakeUpstream
    ) -> None:
        upstream.answers = [whole(said(SAFE)), events(response(said(SAFE)))]
        told = sdk.responses.create(model="m", input=SAFE, moderation=MODERATION).moderation
        with sdk.responses.stream(model="m", input=SAFE, moderation=MODERATION) as stream:
            streamed = stream.get_final_response().moderation
        for moderation in (told, streamed):
            assert moderation is not None
            assert moderation.input.type == moderation.output.type == "moderation_result"
            assert not moderation.output.flagged
        assert not any("moderation" in received.json for received in upstream.received)

    def test_of_a_blocked_response_tells_the_prompt(self, sdk: openai.OpenAI) -> None:
        found = sdk.responses.create(model="m", input=GRAVE, moderation=MODERATION)
        assert found.moderation is not None
        assert found.moderation.input.type == "moderation_result"
        assert found.moderation.input.flagged
        assert found.moderation.output.type == "error"


class TestCompletions:
    def test_one(self, sdk: openai.OpenAI, upstream: FakeUpstream) -> None:
        upstream.answers = [completion(BAD), completion("better")]
        found = sdk.completions.create(model="m", prompt=SAFE)
        assert found.choices[0].text == "better"
        (choice,) = sdk.completions.create(model="m", prompt=GRAVE).choices
        assert (choice.text, choice.finish_reason) == (REFUSAL, "stop")
        assert len(upstream.received) == 2

    @pytest.mark.parametrize("prompt", [SAFE, GRAVE])
    def test_a_stream(self, sdk: openai.OpenAI, upstream: FakeUpstream, prompt: str) -> None:
        upstream.answers = [completion(GRAVE)]
        chunks = list(sdk.completions.create(model="m", prompt=prompt, stream=True))
        choices = [choice for chunk in chunks for choice in chunk.choices]
        assert "".join(choice.text for choice in choices) == REFUSAL
        assert choices[-1].finish_reason == "stop"

    def test_a_list_of_prompts(self, sdk: openai.OpenAI, upstream: FakeUpstream) -> None:
        upstream.answers = [completion("one", GRAVE, BAD), completion("three")]
        found = sdk.completions.create(model="m", prompt=["a", "b", "c"])
        assert [choice.text for choice in found.choices] == ["one", REFUSAL, "three"]
        assert upstream.received[1].json["prompt"] == ["c"]
        blocked = sdk.completions.create(model="m", prompt=["a", GRAVE])
        assert [choice.text for choice in blocked.choices] == [REFUSAL, REFUSAL]


class TestResponses:
    @pytest.mark.parametrize("prompt", [SAFE, GRAVE])
    def test_a_refusal(self, sdk: openai.OpenAI, upstream: FakeUpstream, prompt: str) -> None:
        upstream.answers = [whole(said(GRAVE)), events(response(said(GRAVE)))]
        found = sdk.responses.create(model="m", input=prompt)
        with sdk.responses.stream(model="m", input=prompt) as stream:
            kinds = [event.type for event in stream]
            streamed = stream.get_final_response()
        for one in (found, streamed):
            assert (one.output_text, one.status, one.error) == (REFUSAL, "completed", None)
        assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
        assert "response.output_text.delta" in kinds

    def test_a_stream_passes(self, sdk: openai.OpenAI, upstream: FakeUpstream) -> None:
        upstream.answers = [events(response(said(SAFE), call(WRITTEN)))]
        read = ""
        with sdk.responses.stream(model="m", input=SAFE) as stream:
            for event in stream:
                if event.type == "response.output_text.delta":
                    read += event.delta
            final = stream.get_final_response()
        assert read == SAFE
        assert [item.type for item in final.output] == ["message", "function_call"]

    def test_a_parser(self, sdk: openai.OpenAI, upstream: FakeUpstream) -> None:
        upstream.answers = [whole(said('{"sky":"blue"}')), whole(said(json.dumps({"sky": GRAVE})))]
        found = sdk.responses.parse(model="m", input=SAFE, text_format=Weather)
        assert found.output_parsed == Weather(sky="blue")
        for prompt in (SAFE, GRAVE):
            refused = sdk.responses.parse(model="m", input=prompt, text_format=Weather)
            assert refused.output_parsed is None
            assert refused.output[0].type == "message"
            (part,) = refused.output[0].content
            assert isinstance(part, ResponseOutputRefusal)
            assert part.refusal == REFUSAL

    def test_a_streaming_parser(self, sdk: openai.OpenAI, upstream: FakeUpstream) -> None:
        with sdk.responses.stream(model="m", input=GRAVE, text_format=Weather) as stream:
            kinds = [event.type for event in stream]
            assert stream.get_final_response().output_parsed is None
        assert "response.refusal.done" in kinds

    def test_a_conversation_goes_on_from_what_was_released(
        self, sdk: openai.OpenAI, upstream: FakeUpstream
    ) -> None:
        upstream.answers = [
            whole(said(BAD), id="resp_bad"),
            whole(said("better"), id="resp_better"),
            whole(said("fine"), id="resp_fine"),
        ]
        first = sdk.responses.create(model="m", input="one")
        assert first.output_text == "better"
        second = sdk.responses.create(model="m", input="two", previous_response_id=first.id)
        assert second.output_text == "fine"
        sent = upstream.received[2]
        assert BAD.encode() not in sent.body
        texts = [
            item["content"] if isinstance(item["content"], str) else item["content"][0]["text"]
            for item in sent.json["input"]
        ]
        assert texts == ["one", "better", "two"]
        assert [received.json["store"] for received in upstream.received] == [False] * 3
        assert "previous_response_id" not in sent.json

    def test_a_response_is_read_again_and_forgotten(
        self, sdk: openai.OpenAI, upstream: FakeUpstream
    ) -> None:
        upstream.answers = [whole(said(SAFE), id="resp_again")]
        made = sdk.responses.create(model="m", input="one")
        assert sdk.responses.retrieve(made.id) == made
        (item,) = sdk.responses.input_items.list(made.id)
        assert item.to_dict()["content"] == [{"type": "input_text", "text": "one"}]
        sdk.responses.delete(made.id)
        with pytest.raises(openai.NotFoundError) as caught:
            sdk.responses.retrieve(made.id)
        assert caught.value.code == "response_not_found"
        assert len(upstream.received) == 1


class TestEmbeddings:
    def test_safe_texts_pass(self, sdk: openai.OpenAI, upstream: FakeUpstream) -> None:
        data = [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}]
        usage = {"prompt_tokens": 3, "total_tokens": 3}
        body = {"object": "list", "model": "m", "data": data, "usage": usage}
        upstream.answers = [Answer(body=compact(body))]
        found = sdk.embeddings.create(model="m", input=[SAFE], encoding_format="float")
        assert found.data[0].embedding == [0.5, 0.25]

    @pytest.mark.parametrize("given", [GRAVE, [SAFE, GRAVE]])
    def test_harmful_texts_are_an_error(
        self, sdk: openai.OpenAI, upstream: FakeUpstream, given: Any
    ) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            sdk.embeddings.create(model="m", input=given)
        assert caught.value.code == "content_filter"
        assert upstream.received == []


class TestErrors:
    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (400, openai.BadRequestError),
            (401, openai.AuthenticationError),
            (404, openai.NotFoundError),
            (422, openai.UnprocessableEntityError),
            (429, openai.RateLimitError),
            (500, openai.InternalServerError),
            (501, openai.InternalServerError),
        ],
    )
    def test_the_upstreams_own_pass_unchanged(
        self,
        sdk: openai.OpenAI,
        upstream: FakeUpstream,
        status: int,
        kind: type[openai.APIStatusError],
    ) -> None:
        raw = b'{"error": {"message":"too long", "type":"BadRequestError","code":%d}}' % status
        upstream.answers = [Answer(body=raw, status=status)] * 2
        for ask in (sdk.chat.completions.create, sdk.chat.completions.parse):
            with pytest.raises(kind) as caught:
                ask(**asked())
            assert caught.value.response.content == raw
            assert detail(caught)["code"] == status

    def test_a_failed_second_attempt_is_a_refusal(
        self, sdk: openai.OpenAI, upstream: FakeUpstream
    ) -> None:
        upstream.answers = [text(BAD), error(400, "too long")]
        found = sdk.chat.completions.create(**asked())
        assert found.choices[0].message.content == REFUSAL

    @pytest.mark.parametrize(
        ("wrong", "code", "param"),
        [
            ({"n": 0}, "invalid_request", "n"),
            ({"messages": []}, "invalid_request", "messages"),
            (
                {"messages": [{"role": "user", "content": [{"type": "file", "text": CANARY}]}]},
                "unscannable",
                "messages[0].content[0]",
            ),
        ],
    )
    def test_a_request_that_is_wrong(
        self, sdk: openai.OpenAI, upstream: FakeUpstream, wrong: Any, code: str, param: str
    ) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            sdk.chat.completions.create(**asked(**wrong))
        assert (caught.value.code, caught.value.param) == (code, param)
        assert caught.value.request_id
        assert CANARY not in str(caught.value)
        assert upstream.received == []

    def test_routes_and_models_that_are_not_here(
        self, start_server: StartServer, connect: Connect
    ) -> None:
        only = {"name": "only", "url": "http://127.0.0.1:9", "models": ("known",)}
        sdk = connect(start_server(upstreams=(only,)))
        with pytest.raises(openai.NotFoundError) as caught:
            sdk.chat.completions.create(**asked())
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError) as caught:
            sdk.audio.speech.create(model="known", voice="alloy", input=CANARY)
        assert caught.value.code == "unknown_route"
        with pytest.raises(openai.InternalServerError) as failed:
            sdk.chat.completions.create(**asked() | {"model": "known"})
        assert (failed.value.status_code, failed.value.code) == (502, "upstream_unreachable")

    def test_no_upstream(self, start_server: StartServer, connect: Connect) -> None:
        with pytest.raises(openai.InternalServerError) as caught:
            connect(start_server()).chat.completions.create(**asked())
        assert (caught.value.status_code, caught.value.code) == (503, "no_upstream")

    def test_too_much_that_waits(self, start_server: StartServer, connect: Connect) -> None:
        guard = SlowGuard()
        server = start_server(guard=guard, waiting_windows=1, upstream=FakeUpstream(text("ok")))
        sdk = connect(server)

        def ask(prompt: str) -> str | None:
            found: ChatCompletion = sdk.chat.completions.create(**asked(prompt))
            return found.choices[0].message.content

        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(ask, "w1")]
            guard.wait_until_entered()
            waiting.append(pool.submit(ask, "w2"))
            while not server.sample("guard_waiting_windows"):
                time.sleep(0.01)
            with pytest.raises(openai.RateLimitError) as caught:
                ask("w3")
            guard.let_go()
            found = [one.result(20) for one in waiting]
        assert found == ["ok", "ok"]
        assert caught.value.code == "overloaded"
        assert caught.value.response.headers["retry-after"] == "1"

    def test_an_answer_that_cannot_be_judged(
        self, sdk: openai.OpenAI, upstream: FakeUpstream
    ) -> None:
        upstream.answers = [Answer(body=b'{"choices": [{"index": 0}]}')]
        with pytest.raises(openai.InternalServerError) as caught:
            sdk.chat.completions.create(**asked())
        assert (caught.value.status_code, caught.value.code) == (502, "upstream_malformed")


class TestManyAndGone:
    async def test_parallel_calls_each_get_their_own(
        self, server: Server, upstream: FakeUpstream
    ) -> None:
        def echo(received: Received) -> Answer:
            return text(received.json["messages"][0]["content"])

        upstream.answers = echo
        prompts = [GRAVE if number % 3 == 0 else f"w{number % 10} {number}" for number in range(60)]
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1",
            api_key="unused",
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
        ) as sdk:
            found = await asyncio.gather(
                *(sdk.chat.completions.create(**asked(prompt)) for prompt in prompts)
            )
            async with sdk.chat.completions.stream(**asked(GRAVE)) as stream:
                final = await stream.get_final_completion()
        read = [one.choices[0].message.content for one in found]
        assert read == [REFUSAL if prompt == GRAVE else prompt for prompt in prompts]
        assert final.choices[0].message.content == REFUSAL

    @pytest.mark.parametrize("streams", [False, True])
    def test_a_timeout_cancels_the_upstream(
        self, server: Server, sdk: openai.OpenAI, upstream: FakeUpstream, streams: bool
    ) -> None:
        upstream.answers = text("late", delay=30.0)
        impatient = sdk.with_options(timeout=0.5)
        with pytest.raises(openai.APITimeoutError):
            impatient.chat.completions.create(**asked(stream=streams))
        server.run(upstream.wait_for_disconnect())

    async def test_a_cancelled_call_cancels_the_upstream(
        self, server: Server, upstream: FakeUpstream
    ) -> None:
        upstream.answers = Answer(body=b"{}", delay=30.0)
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1",
            api_key="unused",
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
        ) as sdk:
            waiting = asyncio.create_task(sdk.responses.create(model="m", input=SAFE))
            await asyncio.to_thread(server.run, upstream.wait_for_request())
            waiting.cancel()
            await asyncio.to_thread(server.run, upstream.wait_for_disconnect())
        with pytest.raises(asyncio.CancelledError):
            await waiting
