"""State: what fails at start, what does not, and how it comes back. Against real servers."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from service.errors import ConfigurationError, StateUnavailable
from service.private_valkey import PrivateValkey
from service.state import State

SECRET = "open-sesame"


@pytest.fixture
async def server(shared: PrivateValkey) -> AsyncIterator[PrivateValkey]:
    """A server that the state under test does not own, as it was configured at first."""
    url = await shared.start()
    # Connected before a test sets a password, this one stays let in.
    async with Redis.from_url(url) as administrator:
        await administrator.flushall()
        yield shared
        if shared.process_id is not None:
            await administrator.acl_setuser(
                "default", enabled=True, nopass=True, categories=["+@all"]
            )
            await administrator.config_set("requirepass", "")
            await administrator.config_set("maxmemory", 64 * 2**20)
            await administrator.config_set("maxmemory-policy", "noeviction")
            await administrator.config_set("port", 0)


@asynccontextmanager
async def opened(url: str | None, tmp_path: Path) -> AsyncIterator[State]:
    state = await State.open(
        url,
        data_directory=tmp_path,
        connect_seconds=0.3,
        command_seconds=0.3,
        probe_seconds=0.05,
    )
    try:
        yield state
    finally:
        await state.close()


async def configure(server: PrivateValkey, *commands: str) -> None:
    async with Redis.from_url(await server.start()) as redis:
        for command in commands:
            await redis.execute_command(*command.split())  # type: ignore[no-untyped-call]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        # What is waited for has no event of its own.
        while not condition():  # noqa: ASYNC110 - the server has no event
            await asyncio.sleep(0.001)


async def kill(server: PrivateValkey) -> None:
    assert server.process_id is not None
    os.kill(server.process_id, signal.SIGKILL)
    await until(lambda: server.process_id is None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def ask_for_ever(state: State) -> None:
    while True:
        async with state.connected() as redis:
            await redis.ping()


async def recovered(state: State) -> None:
    await asyncio.wait_for(state.wait_available(), 5)


async def test_without_a_url_it_is_a_private_server_in_the_data_directory(tmp_path: Path) -> None:
    async with opened(None, tmp_path) as state:
        assert state.available
        async with state.connected() as redis:
            await redis.set("key", "value")

    async with opened(None, tmp_path) as state, state.connected() as redis:
        assert await redis.get("key") == b"value"


async def test_a_private_server_that_was_killed_is_started_again(tmp_path: Path) -> None:
    async with opened(None, tmp_path) as state:
        async with state.connected() as redis:
            await redis.set("key", "value")
            process = (await redis.info("server"))["process_id"]
        os.kill(process, signal.SIGKILL)
        with pytest.raises(StateUnavailable):
            await ask_for_ever(state)

        await recovered(state)

        async with state.connected() as redis:
            assert await redis.get("key") == b"value"
            assert (await redis.info("server"))["process_id"] != process


@pytest.mark.parametrize(
    "url",
    [
        "",
        "redis",
        "redis://",
        f"http://user:{SECRET}@localhost",
        f"redis://user:{SECRET}@localhost:port",
        f"redis://user:{SECRET}@localhost/first",
        f"redis://user:{SECRET}@localhost?colour=red",
        f"redis://user:{SECRET}?/#@localhost",
        "unix://",
    ],
)
async def test_a_url_that_cannot_be_read_fails_at_start(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="state_url cannot be read") as failed:
        await State.open(url, data_directory=tmp_path)

    assert SECRET not in str(failed.value)
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("scheme", ["unix", "redis"])
@pytest.mark.parametrize("credentials", [f":{SECRET}@", f"user:{SECRET}@", ""])
async def test_a_refused_password_fails_at_start(
    scheme: str, credentials: str, server: PrivateValkey, tmp_path: Path
) -> None:
    port = free_port()
    path = (await server.start()).removeprefix("unix://")
    address = path if scheme == "unix" else f"127.0.0.1:{port}"
    await configure(
        server,
        "CONFIG SET bind 127.0.0.1",
        f"CONFIG SET port {port}",
        "CONFIG SET requirepass another",
    )

    with pytest.raises(ConfigurationError, match="refused the user or password") as failed:
        await State.open(f"{scheme}://{credentials}{address}", data_directory=tmp_path)

    assert address in str(failed.value)
    assert SECRET not in str(failed.value)

    async with opened(f"{scheme}://:another@{address}", tmp_path) as state:
        assert state.available


async def test_a_database_that_is_not_there_fails_at_start(
    server: PrivateValkey, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match="DB index is out of range"):
        await State.open(f"{await server.start()}?db=7", data_directory=tmp_path)


@pytest.mark.parametrize(
    ("commands", "policy"),
    [
        (["CONFIG SET maxmemory-policy allkeys-lru"], "allkeys-lru"),
        (["CONFIG SET maxmemory-policy volatile-ttl"], "volatile-ttl"),
        (["CONFIG SET maxmemory-policy allkeys-lfu", "ACL SETUSER default -info"], "allkeys-lfu"),
        (["CONFIG SET maxmemory-policy allkeys-lfu", "ACL SETUSER default -config"], "allkeys-lfu"),
    ],
    ids=["allkeys", "volatile", "without INFO", "without CONFIG"],
)
async def test_a_server_that_evicts_fails_at_start(
    commands: list[str], policy: str, server: PrivateValkey, tmp_path: Path
) -> None:
    await configure(server, *commands)

    with pytest.raises(ConfigurationError, match=f"{policy}.*set noeviction"):
        await State.open(await server.start(), data_directory=tmp_path)


@pytest.mark.parametrize("hidden", [[], ["ACL SETUSER default -info"]])
async def test_a_policy_without_a_memory_limit_evicts_nothing(
    hidden: list[str], server: PrivateValkey, tmp_path: Path
) -> None:
    await configure(
        server, "CONFIG SET maxmemory 0", "CONFIG SET maxmemory-policy allkeys-lru", *hidden
    )

    async with opened(await server.start(), tmp_path) as state:
        assert state.available


async def test_a_server_that_does_not_say_is_taken_with_a_warning(
    server: PrivateValkey, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await configure(server, "ACL SETUSER default -info -config")

    async with opened(await server.start(), tmp_path) as state:
        assert state.available

    assert "does not say whether it evicts" in caplog.text


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
async def test_an_unreachable_server_starts_degraded_and_says_so(
    scheme: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(f"{scheme}://user:{SECRET}@127.0.0.1:{free_port()}/0", tmp_path) as state:
        assert not state.available
        with pytest.raises(StateUnavailable):
            async with state.connected():
                pytest.fail("nothing may be asked of a server that is not there")

    assert caplog.text.count("going on without it") == 1
    assert SECRET not in caplog.text


async def test_a_server_that_comes_up_later_is_used(server: PrivateValkey, tmp_path: Path) -> None:
    url = await server.start()
    await kill(server)

    async with opened(url, tmp_path) as state:
        assert not state.available
        await server.start()
        await recovered(state)
        async with state.connected() as redis:
            assert await redis.set("key", "value")


async def test_a_server_that_answers_late_and_evicts_is_not_used(
    server: PrivateValkey, tmp_path: Path
) -> None:
    await configure(server, "CONFIG SET maxmemory-policy allkeys-lru")
    assert server.process_id is not None
    os.kill(server.process_id, signal.SIGSTOP)

    async with opened(await server.start(), tmp_path) as state:
        assert state.problem == "it did not answer in time"
        os.kill(server.process_id, signal.SIGCONT)
        await until(lambda: "allkeys-lru" in str(state.problem))
        assert not state.available

        await configure(server, "CONFIG SET maxmemory-policy noeviction")
        await recovered(state)


async def test_losing_the_server_is_noticed_by_the_command_and_mended(
    server: PrivateValkey, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with opened(await server.start(), tmp_path) as state:
        await kill(server)

        with pytest.raises(StateUnavailable):
            async with state.connected() as redis:
                await redis.get("key")
        assert not state.available

        await server.start()
        await recovered(state)
        async with state.connected() as redis:
            assert await redis.get("key") is None

    assert "is available again" in caplog.text


async def test_a_server_that_hangs_is_not_waited_for(server: PrivateValkey, tmp_path: Path) -> None:
    async with opened(await server.start(), tmp_path) as state:
        assert server.process_id is not None
        os.kill(server.process_id, signal.SIGSTOP)
        try:
            async with asyncio.timeout(5):
                with pytest.raises(StateUnavailable):
                    async with state.connected() as redis:
                        await redis.get("key")
        finally:
            os.kill(server.process_id, signal.SIGCONT)
        await recovered(state)


async def test_a_command_that_is_refused_does_not_make_state_unavailable(
    server: PrivateValkey, tmp_path: Path
) -> None:
    async with opened(await server.start(), tmp_path) as state:
        async with state.connected() as redis:
            await redis.set("text", "no number")

        with pytest.raises(StateUnavailable, match="refused"):
            async with state.connected() as redis:
                await redis.incr("text")

        assert state.available


async def test_a_failed_start_leaves_no_server_behind(tmp_path: Path) -> None:
    directory = tmp_path / "valkey"
    first = PrivateValkey(directory, 2**20)
    await first.start()
    await first.stop()
    (manifest,) = (directory / "appendonlydir").glob("*.manifest")
    intact = manifest.read_text()
    manifest.write_text("nonsense\n")
    with pytest.raises(ConfigurationError):
        await State.open(None, data_directory=tmp_path)

    manifest.write_text(intact)

    async with opened(None, tmp_path) as state:
        assert state.available
