"""Anthropic's own client before a real server and a fake upstream, on every path."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from pydantic import BaseModel

from service import messages_stream
from tests.fake_upstream import Answer, FakeUpstream, compact
from tests.guards import CANARY
from tests.service.conftest import Server, StartServer

SAFE, BAD, GRAVE = "a fine day", "minor-insulting_behavior here", "severe-violence here"
REFUSAL = "I can't help with that."
POLICY = {
    "version": 1,
    "id": "sdk",
    "rules": [
        {"severity": "moderate", "action": "block"},
        {"direction": "response", "severity": "minor", "action": "regenerate"},
        {"action": "allow"},
    ],
}
PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(64)).decode()
IMAGE = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": PIXEL},
}
TOOL = {
    "name": "send",
    "description": "sends a letter",
    "input_schema": {"type": "object", "properties": {"text": {"type": "string"}}},
}


class Weather(BaseModel):
    sky: str


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def call(said: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": "toolu_1", "name": "send", "input": {"text": said}}


def message(*content: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "type": "message",
        "role": "assistant",
        "content": list(content),
        "model": "m",
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 3, "output_tokens": 4},
        **more,
    }


def whole(*content: dict[str, Any], **more: Any) -> Answer:
    return Answer(body=compact(message(*content, **more)))


def events(*content: dict[str, Any], **more: Any) -> Answer:
    body = {"stop_sequence": None, **message(*content, **more)}
    raw = messages_stream.encoded(messages_stream.events(body))
    return Answer(body=raw, content_type="text/event-stream")


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    return start_server(policy=POLICY, upstream=FakeUpstream())


@pytest.fixture(scope="module")
def sdk(server: Server) -> Iterator[anthropic.Anthropic]:
    """The stock client, as a user configures it."""
    with anthropic.Anthropic(
        base_url=server.url,
        api_key="unused",
        max_retries=0,
        timeout=20,
        http_client=anthropic.DefaultHttpxClient(trust_env=False),
    ) as made:
        yield made


@pytest.fixture
def upstream(server: Server) -> FakeUpstream:
    assert server.upstream is not None
    server.upstream.received.clear()
    return server.upstream


def asked(*said: Any, **more: Any) -> dict[str, Any]:
    """A request's arguments: what the user and the assistant said by turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(said)]
    return {"model": "m", "max_tokens": 99, "messages": messages, **more}


def only(found: anthropic.types.Message) -> str:
    """The text of a message that holds one block."""
    (block,) = found.content
    assert block.type == "text"
    return block.text


class TestWhatIsSafePasses:
    def test_an_answer_byte_for_byte(
        self, sdk: anthropic.Anthropic, upstream: FakeUpstream
    ) -> None:
        # Spaces that no serializer of ours would put there.
        raw = json.dumps(message(text(SAFE)), indent=1).encode()
        upstream.answers = [Answer(body=raw)]
        response = sdk.messages.with_raw_response.create(**asked(SAFE))
        assert response.http_response.content == raw
        assert only(response.parse()) == SAFE
        assert response.headers["x-sluicegate-outcome"] == "allowed"

    def test_a_request_byte_for_byte(self, server: Server, upstream: FakeUpstream) -> None:
        upstream.answers = [whole(text(SAFE))]
        raw = json.dumps(asked(SAFE, top_k=3), indent=1).encode()
        headers = {"content-type": "application/json", "anthropic-version": "2023-06-01"}
        assert server.client().post("/v1/messages", content=raw, headers=headers).is_success
        (received,) = upstream.received
        assert (received.path, received.body) == ("/v1/messages", raw)
        assert ("anthropic-version", "2023-06-01") in received.headers

    def test_a_stream(self, sdk: anthropic.Anthropic, upstream: FakeUpstream) -> None:
        upstream.answers = [events(text(SAFE), call("hello"), stop_reason="tool_use")]
        with sdk.messages.stream(**asked(SAFE, tools=[TOOL])) as stream:
            assert "".join(stream.text_stream) == SAFE
            final = stream.get_final_message()
        assert final.stop_reason == "tool_use"
        assert [block.type for block in final.content] == ["text", "tool_use"]
        assert final.content[1].to_dict()["input"] == {"text": "hello"}

    def test_a_conversation_with_a_tool(
        self, sdk: anthropic.Anthropic, upstream: FakeUpstream
    ) -> None:
        upstream.answers = [whole(text(SAFE))]
        result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sent"}
        assert only(sdk.messages.create(**asked(SAFE, [call("hello")], [result]))) == SAFE


class TestWhatIsNotSafeIsRefused:
    def assert_refused(self, found: anthropic.types.Message) -> None:
        assert only(found) == REFUSAL
        assert (found.role, found.type, found.stop_reason) == ("assistant", "message", "end_turn")
        assert found.id.startswith("msg_")
        assert found.usage.output_tokens == 0

    @pytest.mark.parametrize(
        "request_",
        [
            asked(GRAVE),
            asked([text(SAFE), text(GRAVE)]),
            asked(SAFE, system=GRAVE),
            asked(SAFE, system=[text(GRAVE)]),
            asked(SAFE, GRAVE),
            asked(
                SAFE,
                [call("hello")],
                [{"type": "tool_result", "tool_use_id": "toolu_1", "content": [text(GRAVE)]}],
            ),
            asked(SAFE, [call(GRAVE)]),
            asked(SAFE, tools=[{**TOOL, "description": GRAVE}]),
            asked([{"type": "document", "source": {"type": "text", "data": GRAVE}}]),
        ],
        ids=[
            "prompt", "block", "system", "system block", "prefill", "tool result", "tool use",
            "tool definition", "document",
        ],
    )  # fmt: skip
    def test_before_it_reaches_the_upstream(
        self, sdk: anthropic.Anthropic, upstream: FakeUpstream, request_: dict[str, Any]
    ) -> None:
        self.assert_refused(sdk.messages.create(**request_))
        assert upstream.received == []

    def test_a_prompt_of_a_stream(self, sdk: anthropic.Anthropic, upstream: FakeUpstream) -> None:
        with sdk.messages.stream(**asked(GRAVE)) as stream:
            assert "".join(stream.text_stream) == REFUSAL
            self.assert_refused(stream.get_final_message())

    @pytest.mark.parametrize("said", [text(GRAVE), call(GRAVE)], ids=["text", "tool use"])
    def test_an_answer(
        self, sdk: anthropic.Anthropic, upstream: FakeUpstream, said: dict[str, Any]
    ) -> None:
        upstream.answers = [whole(text(SAFE), said, stop_reason="tool_use", aside=GRAVE)]
        response = sdk.messages.with_raw_response.create(**asked(SAFE, tools=[TOOL]))
        found = response.parse()
        assert (only(found), found.stop_reason) == (REFUSAL, "end_turn")
        assert GRAVE not in response.http_response.text

    @pytest.mark.parametrize("said", [text(GRAVE), call(GRAVE)], ids=["text", "tool use"])
    def test_a_streamed_answer(
        self, sdk: anthropic.Anthropic, upstream: FakeUpstream, said: dict[str, Any]
    ) -> None:
        upstream.answers = [events(text(SAFE), said)]
        with sdk.messages.stream(**asked(SAFE, tools=[TOOL])) as stream:
            assert "".join(stream.text_stream) == REFUSAL
            found = stream.get_final_message()
        assert (only(found), found.stop_reason) == (REFUSAL, "end_turn")

    def test_a_parser_survives_it(self, sdk: anthropic.Anthropic, upstream: FakeUpstream) -> None:
        upstream.answers = [whole(text('{"sky":"blue"}'))]
        told = sdk.messages.parse(**asked(SAFE), output_format=Weather)
        assert told.parsed_output == Weather(sky="blue")
        refused = sdk.messages.parse(**asked(GRAVE), output_format=Weather)
        assert (refused.parsed_output, refused.stop_reason) == (None, "refusal")
        assert refused.stop_details is not None
        assert refused.stop_details.explanation == REFUSAL

    def test_a_streaming_parser_too(self, sdk: anthropic.Anthropic, upstream: FakeUpstream) -> None:
        with sdk.messages.stream(**asked(GRAVE), output_format=Weather) as stream:
            refused = stream.get_final_message()
        assert (refused.parsed_output, refused.stop_reason) == (None, "refusal")
        assert refused.stop_details is not None
        assert refused.stop_details.explanation == REFUSAL


class TestAnotherAttempt:
    def test_is_told_what_was_wrong(self, sdk: anthropic.Anthropic, upstream: FakeUpstream) -> None:
        upstream.answers = [
            whole(text(BAD)),
            whole(text(SAFE), usage={"input_tokens": 9, "output_tokens": 5}),
        ]
        response = sdk.messages.with_raw_response.create(**asked("hi", system="Be kind."))
        found = response.parse()
        assert (only(found), found.usage.output_tokens) == (SAFE, 5)
        assert response.headers["x-sluicegate-attempts"] == "2"
        first, second = (received.json for received in upstream.received)
        assert first["system"] == "Be kind."
        assert second["system"].startswith("Be kind.\n\nA previous answer")
        assert second["messages"] == first["messages"]

    def test_of_a_stream_is_a_stream(
        self, sdk: anthropic.Anthropic, upstream: FakeUpstream
    ) -> None:
        upstream.answers = [events(text(BAD)), events(text(SAFE), call("hello"))]
        with sdk.messages.stream(**asked("hi", tools=[TOOL])) as stream:
            assert "".join(stream.text_stream) == SAFE
            found = stream.get_final_message()
        assert found.content[1].to_dict()["input"] == {"text": "hello"}
        assert len(upstream.received) == 2


class TestErrors:
    def test_an_image_is_refused_and_the_message_says_where(
        self, sdk: anthropic.Anthropic, upstream: FakeUpstream
    ) -> None:
        with pytest.raises(anthropic.BadRequestError) as caught:
            sdk.messages.create(**asked([text(CANARY), IMAGE]))
        assert "messages[0].content[1] cannot be scanned" in str(caught.value)
        assert CANARY not in str(caught.value)
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["error"]["type"] == "invalid_request_error"
        assert caught.value.body["error"]["code"] == "unscannable"
        assert caught.value.body["request_id"] == caught.value.response.headers["x-request-id"]
        assert upstream.received == []

    @pytest.mark.parametrize(
        ("status", "error"),
        [(400, anthropic.BadRequestError), (404, anthropic.NotFoundError)],
    )
    def test_the_upstreams_own_pass_unchanged(
        self,
        sdk: anthropic.Anthropic,
        upstream: FakeUpstream,
        status: int,
        error: type[anthropic.APIStatusError],
    ) -> None:
        raw = b'{"type":"error", "error":{"type":"BadRequestError","message":"too long"}}'
        upstream.answers = [Answer(body=raw, status=status)]
        with pytest.raises(error) as caught:
            sdk.messages.create(**asked(SAFE))
        assert caught.value.response.content == raw

    @pytest.mark.parametrize(
        "answer",
        [
            Answer(body=b'{"type":"message"}'),
            Answer(
                body=messages_stream.encoded([{"type": "error", "error": {"type": "x"}}]),
                content_type="text/event-stream",
            ),
            Answer(
                body=events(text(SAFE)).body.partition(b"event: message_stop")[0],
                content_type="text/event-stream",
            ),
        ],
        ids=["no message", "error event", "cut stream"],
    )
    def test_an_answer_that_cannot_be_judged_is_not_passed(
        self, sdk: anthropic.Anthropic, upstream: FakeUpstream, answer: Answer
    ) -> None:
        upstream.answers = [answer]
        with pytest.raises(anthropic.InternalServerError) as caught:
            sdk.messages.create(**asked(SAFE))
        assert caught.value.status_code == 502
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["error"]["type"] == "api_error"


class TestVerdictsOnRequest:
    def test_stand_beside_a_message(self, sdk: anthropic.Anthropic, upstream: FakeUpstream) -> None:
        upstream.answers = [whole(text(SAFE))]
        told = sdk.messages.create(
            **asked(SAFE),
            extra_body={"moderation": {}},
            extra_headers={"x-sluicegate-annotations": "azure"},
        )
        extra = told.model_extra or {}
        assert extra["moderation"]["output"]["results"][0]["flagged"] is False
        assert extra["content_filter_results"]["violence"]["severity"] == "safe"
        assert "moderation" not in upstream.received[0].json

    def test_come_in_a_stream_that_clients_still_read(
        self, server: Server, sdk: anthropic.Anthropic, upstream: FakeUpstream
    ) -> None:
        said = events(text(SAFE))
        upstream.answers = [said, said]
        with sdk.messages.stream(**asked(SAFE), extra_body={"moderation": {}}) as stream:
            kinds = [str(event.type) for event in stream]
            assert only(stream.get_final_message()) == SAFE
        assert kinds[-1] == "message_stop"
        request = asked(SAFE, stream=True, moderation={})
        shown = server.client().post("/v1/messages", json=request).content
        before, event, end = shown.partition(b"event: moderation\n")
        assert (event != b"", said.body.startswith(before)) == (True, True)
        assert end.endswith(messages_stream.encoded([{"type": "message_stop"}]))
