"""Streams through the stock OpenAI SDK for Node (`make test-node`)."""

import json
import shutil
import subprocess
from typing import Any

import pytest

from service import streaming
from tests.fake_upstream import Answer, Choice, Completion, Received, ToolCall, pieces, tools
from tests.service.conftest import StartServer, start_server
from tests.service.rig import GRAVE, REFUSAL
from tests.service.wires import BAD_FIRST, CUT, LONG, POLICY, WIRES, Streamed, Streams
from tests.test_node_sdk import NODE

__all__ = ["start_server"]

pytestmark = pytest.mark.node


def answer(received: Received) -> Answer:
    """What the upstream says to a prompt that names what is wanted."""
    body = received.json
    is_retry = b"A previous answer" in received.body
    wire = next(one for one in WIRES.values() if one.path == received.path)
    asked = body.get("prompt") or body.get("input") or body["messages"][-1]["content"]
    if asked in ("tool", "cut tool"):
        text = LONG if asked == "tool" else CUT
        return tools(ToolCall("send", json.dumps({"text": text})), pause=0.001)
    if asked == "three":
        texts = (LONG,) if is_retry else (LONG, BAD_FIRST, CUT)
        return Answer(Completion(tuple(Choice(pieces(one)) for one in texts)), pause=0.001)
    if asked == "error":
        return Streamed(parts=(*wire.growing(LONG), wire.error), pause=0.002, delay=0.5)
    if asked == "stall":
        return Streamed(parts=tuple(wire.growing(LONG)), then="stall")
    again = LONG if is_retry else BAD_FIRST
    says = {"again": again, "exhausted": BAD_FIRST, "blocked": GRAVE, "cut": CUT}
    events = wire.events(says.get(asked, LONG))
    if asked == "crlf":
        events = [b": a comment\r\n\r\n" + one.replace(b"\n", b"\r\n") for one in events]
    return Streamed(parts=tuple(events), pause=0.001, delay=0.5 if asked == "slow" else 0)


@pytest.fixture(scope="module")
def upstream() -> Streams:
    made = Streams()
    made.answers = answer
    return made


@pytest.fixture(scope="module")
def seen(start_server: StartServer, upstream: Streams) -> dict[str, Any]:
    """What the SDK saw, by case; with signs of life all the while."""
    if shutil.which("node") is None or not (NODE / "node_modules").is_dir():
        pytest.skip("no Node, or no SDK in tests/node: make test-node installs it")
    server = start_server(policy=POLICY, upstream=upstream)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "KEEP_ALIVE_SECONDS", 0.1)
        run = subprocess.run(
            ["node", "streams.mjs", server.url],
            cwd=NODE,
            capture_output=True,
            timeout=180,
            check=False,
        )
    assert run.returncode == 0, run.stderr.decode()
    shown: dict[str, Any] = json.loads(run.stdout)
    server.run(upstream.wait_for_disconnect())
    return shown


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("safe", LONG),
        ("slow", LONG),
        ("crlf", LONG),
        ("again", LONG),
        ("exhausted", REFUSAL),
        ("blocked", REFUSAL),
        ("severe-violence", REFUSAL),
    ],
)
def test_a_stream_is_read_to_its_end(seen: dict[str, Any], case: str, text: str) -> None:
    found = seen[case]
    assert (found["deltas"], found["texts"], found["ends"]) == (text, [text], ["stop"])


def test_a_stream_that_is_cut_is_an_answer_that_was_filtered(seen: dict[str, Any]) -> None:
    found = seen["cut"]
    assert found["texts"] == [found["deltas"]]
    assert found["ends"] == ["content_filter"]
    assert len(found["deltas"]) > 50
    assert LONG.startswith(found["deltas"])


def test_a_call_is_whole_or_cut_before_what_is_bad(seen: dict[str, Any]) -> None:
    (whole,) = seen["tool"]["calls"]
    assert (json.loads(whole), seen["tool"]["ends"]) == ({"text": LONG}, ["tool_calls"])
    (part,) = seen["cutTool"]["calls"]
    assert seen["cutTool"]["ends"] == ["content_filter"]
    assert json.dumps({"text": LONG})[:-2].startswith(part)


def test_of_three_choices_each_goes_its_own_way(seen: dict[str, Any]) -> None:
    found = seen["three"]
    assert found["ends"] == ["stop", "stop", "content_filter"]
    assert found["texts"][:2] == [LONG, LONG]
    assert LONG.startswith(found["texts"][2])
    assert found["texts"][2]
    assert found["tokens"] > 0


def test_other_dialects_end_in_their_own_way(seen: dict[str, Any]) -> None:
    assert seen["response"] == {
        "deltas": LONG, "last": "response.completed", "text": LONG, "status": "completed"
    }  # fmt: skip
    cut = seen["cutResponse"]
    assert (cut["last"], cut["status"]) == ("response.incomplete", "incomplete")
    assert cut["text"] == cut["deltas"] != ""
    assert LONG.startswith(cut["text"])
    assert seen["completion"] == {"text": LONG, "end": "stop"}
    assert seen["cutCompletion"]["end"] == "content_filter"
    assert LONG.startswith(seen["cutCompletion"]["text"])


def test_an_error_in_a_stream_is_thrown(seen: dict[str, Any]) -> None:
    assert seen["error"] == [True, "upstream_malformed"]


def test_a_client_that_aborts_stops_the_upstream(seen: dict[str, Any], upstream: Streams) -> None:
    assert seen["left"] == "APIUserAbortError"
    last = upstream.disconnected[-1]
    assert last.json["messages"][-1]["content"] == "stall"


def test_nothing_bad_was_seen(seen: dict[str, Any]) -> None:
    assert "violence" not in json.dumps({key: seen[key] for key in seen if "violence" not in key})
    assert "insulting" not in json.dumps(seen)
