"""The stock OpenAI SDK for Node against a running service (`make test-node`)."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.fake_upstream import FakeUpstream, text
from tests.service.conftest import StartServer, start_server

__all__ = ["start_server"]

NODE = Path(__file__).parent / "node"
REFUSAL = "I can't help with that."

pytestmark = pytest.mark.node


@pytest.fixture(scope="module")
def seen(start_server: StartServer) -> dict[str, object]:
    """What the SDK saw, by case."""
    if shutil.which("node") is None or not (NODE / "node_modules").is_dir():
        pytest.skip("no Node, or no SDK in tests/node: make test-node installs it")
    server = start_server(upstream=FakeUpstream(text("hello there")))
    run = subprocess.run(
        ["node", "conformance.mjs", server.url],
        cwd=NODE,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr.decode()
    shown: dict[str, object] = json.loads(run.stdout)
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
        ("image", ["BadRequestError", 400, "unscannable", "messages[0].content[0]"]),
    ],
)
def test_the_sdk_reads(seen: dict[str, object], case: str, expected: object) -> None:
    assert seen[case] == expected


def test_the_events_of_a_refused_response_are_whole(seen: dict[str, object]) -> None:
    events = seen["responseEvents"]
    assert isinstance(events, list)
    assert events[0] == "response.created"
    assert events[-1] == "response.completed"
    assert "response.output_text.delta" in events
