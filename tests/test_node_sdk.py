"""The stock OpenAI SDK for Node against a running service (`make test-node`)."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

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
from tests.service.conftest import StartServer, start_server
from tests.service.rig import BAD, GRAVE, REFUSAL
from tests.service.test_openai_sdk import POLICY
from tests.service.test_responses import response, said

__all__ = ["start_server"]

NODE = Path(__file__).parent / "node"
EMBEDDINGS = compact(
    {"object": "list", "model": "m", "usage": {"prompt_tokens": 1, "total_tokens": 1}}
    | {"data": [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}]}
)

pytestmark = pytest.mark.node


def answer(received: Received) -> Answer:
    """What the upstream says: harm at first, where it is asked for what may come out so."""
    body = received.json
    is_retry = b"A previous answer" in received.body
    if received.path == "/v1/embeddings":
        return Answer(body=EMBEDDINGS)
    if received.path == "/v1/responses":
        asked = "better" if is_retry else BAD
        words = asked if body["input"] == "bad" else "fine"
        return Answer(body=compact(response(said(words), id=f"resp_{words.split()[0]}")))
    match body["messages"][-1]["content"]:
        case "call":
            return tools(ToolCall("send", json.dumps({"text": "hello" if is_retry else BAD})))
        case "three":
            return text("two") if is_retry else text("one", BAD, GRAVE)
        case "malformed":
            return Answer(body=b"{}")
        case "400" | "429" | "500" as status:
            return error(int(status), "not now")
    return text("hello there")


@pytest.fixture(scope="module")
def upstream() -> FakeUpstream:
    return FakeUpstream(answer)


@pytest.fixture(scope="module")
def seen(start_server: StartServer, upstream: FakeUpstream) -> dict[str, Any]:
    """What the SDK saw, by case."""
    if shutil.which("node") is None or not (NODE / "node_modules").is_dir():
        pytest.skip("no Node, or no SDK in tests/node: make test-node installs it")
    server = start_server(policy=POLICY, upstream=upstream)
    run = subprocess.run(
        ["node", "conformance.mjs", server.url],
        cwd=NODE,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr.decode()
    shown: dict[str, Any] = json.loads(run.stdout)
    return shown


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("chat", "hello there"),
        ("chunks", "hello there"),
        ("refused", [REFUSAL, "stop"]),
        ("refusedStream", REFUSAL),
        ("parsed", [REFUSAL, None]),
        ("moderation", "moderation_results"),
        ("response", REFUSAL),
        ("completion", REFUSAL),
        ("tool", ["send", {"text": "hello"}, "tool_calls"]),
        ("toolStream", ["send", {"text": "hello"}]),
        ("choices", ["one", "two", REFUSAL]),
        ("choicesStream", ["one", "two", REFUSAL]),
        ("turns", ["better", "fine"]),
        ("readAgain", "better"),
        ("inputItems", ["w2", "better", "bad"]),
        ("parsedResponse", [None, REFUSAL]),
        ("embedding", [0.5, 0.25]),
    ],
)
def test_the_sdk_reads(seen: dict[str, Any], case: str, expected: object) -> None:
    assert seen[case] == expected


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("image", ["BadRequestError", 400, "unscannable", "messages[0].content[0]"]),
        ("many", ["BadRequestError", 400, "invalid_request", "n"]),
        ("route", ["NotFoundError", 404, "unknown_route", None]),
        ("forgotten", ["NotFoundError", 404, "response_not_found", None]),
        ("background", ["BadRequestError", 400, "background_unsupported", "background"]),
        ("harmfulEmbedding", ["BadRequestError", 400, "content_filter", "prompt"]),
        ("malformed", ["InternalServerError", 502, "upstream_malformed", None]),
        ("upstream400", ["BadRequestError", 400, 400, None]),
        ("upstream429", ["RateLimitError", 429, 429, None]),
        ("upstream500", ["InternalServerError", 500, 500, None]),
    ],
)
def test_the_sdk_raises(seen: dict[str, Any], case: str, expected: object) -> None:
    assert seen["errors"][case] == expected


def test_the_events_of_a_refused_response_are_whole(seen: dict[str, Any]) -> None:
    events = seen["responseEvents"]
    assert events[0] == "response.created"
    assert events[-1] == "response.completed"
    assert "response.output_text.delta" in events


def test_a_conversation_goes_on_without_what_was_rejected(
    seen: dict[str, Any], upstream: FakeUpstream
) -> None:
    asked = [received.json for received in upstream.received if received.path == "/v1/responses"]
    # A stream's prompt is judged while the upstream is asked already.
    sent = [one for one in asked if not (one.get("stream") and one["input"] == "severe-violence")]
    assert [one["input"] for one in sent[:2]] == ["bad", "bad"]
    assert BAD not in json.dumps(sent[2])
    assert [item["role"] for item in sent[2]["input"]] == ["user", "assistant", "user"]
    assert seen["turns"] == ["better", "fine"]
