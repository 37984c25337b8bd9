"""``sluicegate keys``: beside a running service and without one, by every way to its state."""

import asyncio
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from service.key_store import KeyStore
from service.keys import match, parse_token
from service.private_valkey import PrivateValkey
from service.state import State
from sluicegate import app


@pytest.fixture(autouse=True)
def a_wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory that the tests share; each makes keys of its own."""
    return tmp_path_factory.mktemp("data")


def run(place: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments, "--data-directory", str(place)])


def printed(result: Result) -> str:
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    assert not result.stderr
    return line


def refused(result: Result) -> str:
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line.removeprefix("sluicegate: ")


def listed(place: Path, name: str) -> dict[str, Any]:
    result = run(place, "list", "--json")
    assert result.exit_code == 0, result.output
    (one,) = [key for key in map(json.loads, result.stdout.splitlines()) if key["name"] == name]
    assert isinstance(one, dict)
    return one


def created(place: Path, name: str, *arguments: str) -> tuple[str, str]:
    """The id and the secret of a new key."""
    token = parse_token(printed(run(place, "create", name, "--role", "caller", *arguments)))
    assert token is not None
    return token


def test_a_key_is_made_listed_rotated_and_revoked(place: Path) -> None:
    identity, secret = created(place, "web")
    shown = run(place, "list").stdout
    assert identity in shown
    assert secret not in shown

    rotated = parse_token(printed(run(place, "rotate", identity)))

    assert rotated is not None
    assert rotated[0] == identity
    assert rotated[1] != secret
    assert "web" in printed(run(place, "revoke", identity))
    assert listed(place, "web")["state"] == "revoked"
    assert "revoked" in refused(run(place, "rotate", identity))


def test_what_it_grants_is_as_it_was_said(place: Path) -> None:
    created(
        place,
        "narrow",
        *("--role", "viewer", "--policy", "strict", "--expires", "30d"),
        *("--route", "/v1/guard", "--route", "/v1/moderations"),
        *("--limit", "60/minute", "--limit", "/v1/guard=5/second", "--limit", "1000/hour"),
        *("--upstream-key", "team-a"),
    )
    key = listed(place, "narrow")
    assert key["roles"] == ["caller", "viewer"]
    assert key["policy"] == "strict"
    assert key["expires"] - key["created"] == pytest.approx(30 * 86_400, abs=60)
    assert key["routes"] == ["/v1/guard", "/v1/moderations"]
    assert key["limits"] == {"*": ["60/minute", "1000/hour"], "/v1/guard": ["5/second"]}
    assert key["upstream_key"] == "team-a"
    assert "digest" not in key


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["create", "x", "--role", "boss"], "'boss' is no role"),
        (["create", "", "--role", "caller"], "name"),
        (["create", "x", "--role", "caller", "--expires", "soon"], "'soon' is no duration"),
        (["create", "x", "--role", "caller", "--expires", "999999w"], "longer than 100 years"),
        (["create", "x", "--role", "caller", "--limit", "often"], "'often' is no limit"),
        (
            ["create", "x", "--role", "caller", "--limit", "9/minute", "--limit", "5/60s"],
            "two limits for all routes count over the same time",
        ),
        (["create", "x", "--role", "caller", "--route", "v1"], "'v1' is no route"),
        (["revoke", "nobody"], "no key nobody"),
        (["rotate", "nobody"], "no key nobody"),
        (["list", "--state-url", "http://a"], "state_url cannot be read"),
        (["list", "--config", "/not/there.yaml"], "/not/there.yaml"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    place: Path, arguments: list[str], says: str
) -> None:
    assert says in refused(run(place, *arguments))


def test_a_server_that_is_not_there_is_named(place: Path) -> None:
    with socket.socket() as taken:
        # Bound and not listened on: nobody answers here, and nobody else can.
        taken.bind(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{taken.getsockname()[1]}"
        assert "unavailable" in refused(run(place, "list", "--state-url", url))


@pytest.mark.parametrize("depth", [0, 120], ids=["a short path", "a path too long for a socket"])
def test_beside_a_running_service_its_keys_are_changed(tmp_path: Path, depth: int) -> None:
    place = tmp_path / "p q%20" / ("x" * depth)

    async def beside() -> None:
        state = await State.open(None, data_directory=place)
        try:
            store = KeyStore(state, refresh_seconds=0.02)
            await store.start()
            identity, secret = await asyncio.to_thread(created, place, "web")
            async with asyncio.timeout(30):
                while match(store.find(identity), secret) == "none":  # noqa: ASYNC110 - no event
                    await asyncio.sleep(0.01)
            await store.close()
            assert state.available
        finally:
            await state.close()

    asyncio.run(beside())


def test_the_server_may_be_named(tmp_path: Path) -> None:
    async def start() -> tuple[PrivateValkey, str]:
        valkey = PrivateValkey(tmp_path / "elsewhere", 2**24, stop_seconds=0.0)
        return valkey, await valkey.start()

    valkey, url = asyncio.run(start())
    try:
        token = printed(run(tmp_path, "create", "web", "--role", "admin", "--state-url", url))
        assert parse_token(token)
        shown = run(tmp_path, "list", "--json", "--state-url", url).stdout
        assert json.loads(shown)["roles"] == ["admin"]
        assert not (tmp_path / "valkey").exists()
    finally:
        asyncio.run(valkey.stop())


def test_no_guard_and_no_trainer_is_loaded(place: Path) -> None:
    program = (
        "import sys\nfrom sluicegate import app\n"
        f"app(['keys', 'list', '--data-directory', {str(place)!r}], standalone_mode=False)\n"
        "assert not {'torch', 'onnxruntime', 'transformers', 'training'} & sys.modules.keys()"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, cwd=root)
