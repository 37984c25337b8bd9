"""State in Redis as others run it: users, TLS, Sentinel, a cluster. Against real servers."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.crc import key_slot

from service.errors import ConfigurationError, StateUnavailable
from service.private_valkey import PrivateValkey
from service.state import State
from service.state_client import masked
from tests.service.valkeys import behind_tls, cluster, free_port, started, until, watched

SECRET = "open-sesame"


@asynccontextmanager
async def opened(url: str, tmp_path: Path, **options: Any) -> AsyncIterator[State]:
    state = await State.open(
        url,
        data_directory=tmp_path,
        probe_seconds=0.05,
        **{"connect_seconds": 5.0, "command_seconds": 10.0, **options},
    )
    try:
        yield state
    finally:
        await state.close()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[PrivateValkey]:
    valkey = PrivateValkey(tmp_path / "server", 64 * 2**20, stop_seconds=0.0)
    await valkey.start()
    yield valkey
    await valkey.stop()


async def write(state: State, key: str, value: str) -> None:
    async with state.connected() as redis:
        await redis.set(key, value)


async def read(state: State, key: str) -> bytes | None:
    async with state.connected() as redis:
        value: Any = await redis.get(key)
    assert value is None or isinstance(value, bytes)
    return value


async def again_and_again(state: State, command: Callable[[], Awaitable[Any]]) -> Any:
    """What ``command`` gives as soon as state can be used."""
    async with asyncio.timeout(30):
        while True:
            await state.wait_available()
            try:
                async with state.connected():
                    return await command()
            except StateUnavailable:
                await asyncio.sleep(0.05)


async def write_again_and_again(state: State, key: str, value: str) -> None:
    """Returns when it was written, as a caller who goes on without state would do."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await write(state, key, value)
            except StateUnavailable:
                await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    "url",
    [
        f"redis+sentinel://user:{SECRET}@127.0.0.1:1",
        f"redis+sentinel://user:{SECRET}@127.0.0.1:1/main/first",
        f"redis+sentinel://user:{SECRET}@127.0.0.1:1,/main",
        f"redis+sentinel://user:{SECRET}@127.0.0.1:port/main",
        f"redis+sentinel://user:{SECRET}@127.0.0.1:1/main?colour=red",
        f"redis+sentinel://user:{SECRET}@127.0.0.1:1/main?sentinel_colour=red",
        "redis+sentinel:///main",
        f"unix+sentinel://user:{SECRET}@127.0.0.1:1/main",
        f"redis+cluster://user:{SECRET}@127.0.0.1:1/1",
        f"redis+cluster://user:{SECRET}@127.0.0.1:1/?colour=red",
        f"redis+cluster://user:{SECRET}@127.0.0.1:port",
        "redis+cluster://",
        "redis+tower://127.0.0.1",
    ],
)
async def test_a_url_that_cannot_be_read_names_its_setting(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^cache_url cannot be read: write ") as failed:
        await State.open(url, data_directory=tmp_path, setting="cache_url")

    assert SECRET not in str(failed.value)
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@host:1/0?password=x", "redis://user:***@host:1/0"),
        ("redis+sentinel://u:s@one:1,two:2/main", "redis+sentinel://u:***@one:1,two:2/main"),
        ("redis+cluster://:s@one,two", "redis+cluster://:***@one,two"),
    ],
)
def test_what_is_shown_of_a_url_holds_no_secret(url: str, shown: str) -> None:
    assert masked(url) == shown


@pytest.mark.parametrize("kind", ["sentinel", "cluster"])
async def test_what_is_not_there_starts_degraded_and_says_so(kind: str, tmp_path: Path) -> None:
    name = "/main" if kind == "sentinel" else ""
    places = f"127.0.0.1:{free_port()},127.0.0.1:{free_port()}"
    async with opened(f"redis+{kind}://u:{SECRET}@{places}{name}", tmp_path) as state:
        assert not state.available
        assert state.problem
        assert SECRET not in state.problem


async def test_only_a_cache_may_evict(server: PrivateValkey, tmp_path: Path) -> None:
    url = await server.start()
    async with Redis.from_url(url) as redis:
        await redis.config_set("maxmemory-policy", "allkeys-lru")

    with pytest.raises(ConfigurationError, match=r"^state_url .*allkeys-lru"):
        await State.open(url, data_directory=tmp_path)
    async with opened(url, tmp_path, setting="cache_url", may_evict=True) as state:
        assert state.available


async def test_a_user_with_rights_on_our_keys_only_is_enough(
    server: PrivateValkey, tmp_path: Path
) -> None:
    url = await server.start()
    async with Redis.from_url(url) as redis:
        await redis.acl_setuser(
            "gate",
            enabled=True,
            passwords=[f"+{SECRET}"],
            keys=["sg1:*"],
            categories=["+@all", "-@dangerous", "-@admin"],
        )
    place = url.removeprefix("unix://")

    async with opened(f"unix://gate:{SECRET}@{place}", tmp_path) as state:
        await write(state, "sg1:a", "1")
        assert await read(state, "sg1:a") == b"1"
        with pytest.raises(StateUnavailable, match="refused"):
            await write(state, "other", "1")
        assert state.available

    with pytest.raises(ConfigurationError, match=r"^cache_url unix://gate:\*\*\*@.*refused the"):
        await State.open(f"unix://gate:wrong@{place}", data_directory=tmp_path, setting="cache_url")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the command openssl")
async def test_tls_with_a_certificate_of_ones_own(server: PrivateValkey, tmp_path: Path) -> None:
    path = (await server.start()).removeprefix("unix://")
    async with behind_tls(tmp_path, path) as (port, certificate):
        url = f"rediss://127.0.0.1:{port}"
        async with opened(f"{url}?ssl_ca_certs={certificate}", tmp_path) as state:
            assert state.available
            await write(state, "key", "value")
            assert await read(state, "key") == b"value"

        with pytest.raises(ConfigurationError, match=r"certificate is not trusted.*ssl_ca_certs"):
            # Reading the authorities of the world takes a busy machine a while.
            await State.open(
                url, data_directory=tmp_path, connect_seconds=30.0, command_seconds=30.0
            )


class TestBehindSentinel:
    async def test_it_follows_the_primary(self, tmp_path: Path) -> None:
        async with watched(tmp_path) as (primary, replica, sentinel):
            url = f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{sentinel.port}/main"
            async with opened(url, tmp_path) as state:
                script = state.script("return redis.call('INCR', KEYS[1])")
                alone = state.dedicated()
                async with state.connected():
                    assert await script(["n"], client=alone) == 1
                    assert await alone.execute_command("WAIT", 1, 2000) == 1  # type: ignore[no-untyped-call]

                primary.kill()
                await write_again_and_again(state, "key", "value")

                assert await replica.command("GET", "key") == b"value"
                # Its own connection may learn of the failover only when it is used.
                assert await again_and_again(state, lambda: script(["n"], client=alone)) == 2

    async def test_a_primary_that_was_demoted_is_left(self, tmp_path: Path) -> None:
        async with (
            watched(tmp_path) as (primary, replica, sentinel),
            opened(f"redis+sentinel://127.0.0.1:{sentinel.port}/main", tmp_path) as state,
        ):
            await write(state, "key", "old")

            await sentinel.command("SENTINEL", "FAILOVER", "main")
            await until(lambda: _is_replica(primary.port))
            await write_again_and_again(state, "key", "new")

            assert await replica.command("GET", "key") == b"new"

    async def test_a_service_that_they_do_not_know_fails_at_start(self, tmp_path: Path) -> None:
        configuration = tmp_path / "sentinel.conf"
        configuration.write_text("")
        with started(tmp_path / "sentinel", str(configuration), "--sentinel") as sentinel:
            await until(lambda: _answers(sentinel.port))
            with pytest.raises(ConfigurationError, match="know no service 'main'"):
                await State.open(
                    f"redis+sentinel://127.0.0.1:{sentinel.port}/main", data_directory=tmp_path
                )

    async def test_their_own_password(self, tmp_path: Path) -> None:
        configuration = tmp_path / "sentinel.conf"
        with started(tmp_path / "primary") as primary:
            configuration.write_text(
                f"requirepass {SECRET}\nsentinel monitor main 127.0.0.1 {primary.port} 1\n"
            )
            with started(tmp_path / "sentinel", str(configuration), "--sentinel") as sentinel:
                url = f"redis+sentinel://127.0.0.1:{sentinel.port}/main"
                await until(lambda: _answers(sentinel.port, SECRET))
                async with opened(f"{url}?sentinel_password={SECRET}", tmp_path) as state:
                    assert state.available
                with pytest.raises(ConfigurationError, match="refused the user or password"):
                    await State.open(url, data_directory=tmp_path)


class TestCluster:
    async def test_commands_scripts_and_pipelines(self, tmp_path: Path) -> None:
        async with (
            cluster(tmp_path, 1) as (node,),
            opened(f"redis+cluster://127.0.0.1:{node.port}", tmp_path) as state,
        ):
            assert state.available
            script = state.script("redis.call('SET', KEYS[1], ARGV[1]) return KEYS[2]")
            alone = state.dedicated()
            async with state.connected() as redis:
                assert await script(["{a}:1", "{a}:2"], ["x"], client=alone) == b"{a}:2"
                async with redis.pipeline(transaction=True) as both:
                    both.set("{a}:2", "y")
                    both.get("{a}:1")
                    assert (await both.execute())[1] == b"x"
                assert await redis.mget(["{a}:1", "{a}:2"]) == [b"x", b"y"]

    async def test_slots_may_move(self, tmp_path: Path) -> None:
        async with (
            cluster(tmp_path, 2) as (one, other),
            opened(f"redis+cluster://127.0.0.1:{one.port}", tmp_path) as state,
        ):
            keys = [f"sg1:{number}" for number in range(20)]
            for key in keys:
                await write(state, key, "old")
                async with state.connected() as redis:
                    await redis.delete(key)

            moved = next(key for key in keys if key_slot(key.encode()) < 8192)
            name = (await other.command("CLUSTER", "MYID")).decode()
            for server in (other, one):
                slot = key_slot(moved.encode())
                await server.command("CLUSTER", "SETSLOT", slot, "NODE", name)
            await write(state, moved, "new")

            assert await other.command("GET", moved) == b"new"
            assert await read(state, moved) == b"new"

    async def test_more_callers_than_connections_wait_for_one(self, tmp_path: Path) -> None:
        async with cluster(tmp_path, 1) as (node,):
            url = f"redis+cluster://127.0.0.1:{node.port}"
            async with opened(url, tmp_path, connections=2, command_seconds=10.0) as state:
                await asyncio.gather(*(write(state, f"sg1:{n}", "x") for n in range(50)))
                assert state.available
                assert len(await node.command("KEYS", "sg1:*")) == 50

    async def test_a_server_that_is_no_cluster_fails_at_start(self, tmp_path: Path) -> None:
        with started(tmp_path / "server") as server:
            await until(lambda: _answers(server.port))
            with pytest.raises(ConfigurationError, match=r"cluster support disabled.*the URL"):
                await State.open(
                    f"redis+cluster://127.0.0.1:{server.port}", data_directory=tmp_path
                )

    async def test_one_that_evicts_fails_at_start(self, tmp_path: Path) -> None:
        async with cluster(tmp_path, 2) as (one, other):
            await other.command("CONFIG", "SET", "maxmemory", 2**24)
            await other.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
            with pytest.raises(ConfigurationError, match=r"^state_url .*set noeviction"):
                await State.open(f"redis+cluster://127.0.0.1:{one.port}", data_directory=tmp_path)


async def test_a_server_that_was_demoted_is_connected_to_anew(tmp_path: Path) -> None:
    with started(tmp_path / "server") as server:
        await until(lambda: _answers(server.port))
        async with opened(f"redis://127.0.0.1:{server.port}", tmp_path) as state:
            await write(state, "key", "value")
            before = await _connections(server.port)
            await server.command("REPLICAOF", "127.0.0.1", free_port())

            with pytest.raises(StateUnavailable, match="takes no writes"):
                await write(state, "key", "value")
            await server.command("REPLICAOF", "NO", "ONE")
            await write_again_and_again(state, "key", "again")

            assert not before & await _connections(server.port)


async def _connections(port: int) -> set[str]:
    async with Redis(port=port, protocol=2, client_name="test") as redis:
        return {str(one["id"]) for one in await redis.client_list() if one["name"] != "test"}


async def _is_replica(port: int) -> bool:
    async with Redis(port=port, protocol=2) as redis:
        return bool((await redis.info("replication"))["role"] == "slave")


async def _answers(port: int, password: str | None = None) -> bool:
    async with Redis(port=port, password=password, protocol=2) as redis:
        return bool(await redis.ping())
