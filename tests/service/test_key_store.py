"""Keys that all replicas share, and that outlive their server for a while. A real Valkey."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from service import key_store
from service.caller import Role
from service.errors import NotFound, StateUnavailable, StoreFull
from service.key_store import CHANGES, KEYS, KeyStore
from service.keys import KeyFormatError, Rate, match, parse_token
from service.private_valkey import PrivateValkey
from service.state import State

CALLER: frozenset[Role] = frozenset({"caller"})


@asynccontextmanager
async def opened(
    server: PrivateValkey, tmp_path: Path, stale_seconds: float = 3600.0, most: int = 10_000
) -> AsyncIterator[KeyStore]:
    """A store as a replica has it."""
    state = await State.open(
        await server.start(),
        data_directory=tmp_path,
        connect_seconds=30.0,
        command_seconds=30.0,
        probe_seconds=0.05,
    )
    store = KeyStore(state, refresh_seconds=0.05, stale_seconds=stale_seconds, most=most)
    await store.start()
    try:
        yield store
    finally:
        await store.close()
        await state.close()


@pytest.fixture
async def store(server: PrivateValkey, tmp_path: Path) -> AsyncIterator[KeyStore]:
    async with opened(server, tmp_path) as made:
        yield made


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        # What is waited for has no event of its own.
        while not condition():  # noqa: ASYNC110 - the server has no event
            await asyncio.sleep(0.01)


async def kill(server: PrivateValkey) -> None:
    assert server.process_id is not None
    os.kill(server.process_id, signal.SIGKILL)
    await until(lambda: server.process_id is None)


def is_unavailable(store: KeyStore) -> bool:
    try:
        store.find("whoever")
    except StateUnavailable:
        return True
    return False


async def edit(server: PrivateValkey, identity: str, **values: object) -> None:
    """What another release might write."""
    async with Redis.from_url(await server.start()) as redis:
        data = json.loads(await redis.hget(KEYS, identity) or b"{}") | values
        await redis.hset(KEYS, identity, json.dumps(data))
        await redis.incr(CHANGES)


async def test_a_new_key_is_found_at_once_with_all_that_it_grants(store: KeyStore) -> None:
    key, token = await store.create(
        "web",
        CALLER,
        expires=2e9,
        policy="strict",
        upstream_key="team",
        routes=("/v1/guard",),
        limits={"*": (Rate(60, 60),)},
    )

    assert store.find(key.id) == key
    read = parse_token(token)
    assert read is not None
    assert read[0] == key.id
    assert match(store.find(key.id), read[1]) == "current"
    assert store.find("another") is None


async def test_no_secret_is_in_redis(store: KeyStore, server: PrivateValkey) -> None:
    _, token = await store.create("web", CALLER)
    async with Redis.from_url(await server.start()) as redis:
        kept: dict[Any, Any] = await redis.hgetall(KEYS)
    assert token.rpartition("-")[2] not in b"".join(kept.values()).decode()


async def test_another_replica_learns_of_a_key_and_of_its_end(
    store: KeyStore, server: PrivateValkey, tmp_path: Path
) -> None:
    async with opened(server, tmp_path) as other:
        key, _ = await store.create("web", CALLER)
        await until(lambda: other.find(key.id) == key)

        await other.revoke(key.id)

        await until(lambda: (found := store.find(key.id)) is not None and found.revoked is not None)


async def test_keys_are_listed_by_age_and_stay_when_they_end(store: KeyStore) -> None:
    made = [(await store.create(name, CALLER))[0] for name in ("first", "second", "third")]
    await store.revoke(made[1].id)

    listed = await store.listed()

    assert [key.name for key in listed] == ["first", "second", "third"]
    assert [key.state(time.time()) for key in listed] == ["live", "revoked", "live"]


async def test_a_key_that_was_revoked_keeps_the_time_of_it(store: KeyStore) -> None:
    key, _ = await store.create("web", CALLER)
    first = await store.revoke(key.id)
    assert await store.revoke(key.id) == first


async def test_a_rotated_key_has_a_new_token_and_its_old_one_for_a_while(store: KeyStore) -> None:
    key, old = await store.create("web", CALLER)
    rotated, new = await store.rotate(key.id, keep_seconds=60)

    assert match(rotated, new.rpartition("-")[2]) == "current"
    assert match(rotated, old.rpartition("-")[2]) == "previous"
    assert rotated.previous_until is not None
    assert 0 < rotated.previous_until - time.time() <= 60
    assert store.find(key.id) == rotated


async def test_a_revoked_key_does_not_come_back_by_rotation(store: KeyStore) -> None:
    key, _ = await store.create("web", CALLER)
    await store.revoke(key.id)
    with pytest.raises(NotFound, match="revoked"):
        await store.rotate(key.id)


async def test_a_key_that_is_not_there(store: KeyStore) -> None:
    with pytest.raises(NotFound):
        await store.revoke("nobody")


async def test_what_a_later_release_added_outlives_a_change(
    store: KeyStore, server: PrivateValkey
) -> None:
    key, _ = await store.create("web", CALLER)
    await edit(server, key.id, colour="red")
    await store.revoke(key.id)
    async with Redis.from_url(await server.start()) as redis:
        assert json.loads(await redis.hget(KEYS, key.id) or b"{}")["colour"] == "red"


async def test_a_key_that_cannot_be_read_is_refused_and_named_once(
    store: KeyStore, server: PrivateValkey, caplog: pytest.LogCaptureFixture
) -> None:
    key, _ = await store.create("web", CALLER)
    other, _ = await store.create("other", CALLER)
    await edit(server, key.id, version=99)

    await until(lambda: store.find(key.id) is None)
    await store.revoke(other.id)

    assert store.find(other.id) is not None
    assert caplog.text.count(key.id) == 1


async def test_what_is_no_key_takes_no_other_with_it(
    store: KeyStore, server: PrivateValkey
) -> None:
    key, _ = await store.create("web", CALLER)
    async with Redis.from_url(await server.start()) as redis:
        copied = await redis.hget(KEYS, key.id)
        assert copied is not None
        # A key's own JSON under another id, and what is no JSON.
        await redis.hset(KEYS, "another", copied)
        for number, data in enumerate([b"[" * 100_000, b"\xff", b'{"version": 1, "id": []}']):
            await redis.hset(KEYS, str(number), data)
    await store.revoke(key.id)

    assert [found.id for found in await store.listed()] == [key.id]
    assert store.find("another") is None
    assert (found := store.find(key.id)) is not None
    assert found.revoked is not None


async def test_what_cannot_be_read_here_is_not_changed(
    store: KeyStore, server: PrivateValkey
) -> None:
    key, _ = await store.create("web", CALLER)
    await edit(server, key.id, version=99)
    for change in (store.revoke(key.id), store.rotate(key.id)):
        with pytest.raises(KeyFormatError, match="later release"):
            await change
    async with Redis.from_url(await server.start()) as redis:
        kept = json.loads(await redis.hget(KEYS, key.id) or b"{}")
    assert kept["revoked"] is None
    assert kept["digest"] == key.digest


async def test_all_go_by_the_clock_of_redis(
    store: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 7200)

    key, _ = await store.create("web", CALLER)

    assert key.created == pytest.approx(real(), abs=60)
    assert store.now() == pytest.approx(real(), abs=60)
    assert (await store.revoke(key.id)).revoked == pytest.approx(real(), abs=60)


async def test_changes_at_once_are_all_kept(store: KeyStore) -> None:
    key, _ = await store.create("web", CALLER)
    await asyncio.gather(
        store.rotate(key.id), store.rotate(key.id), store.revoke(key.id), return_exceptions=True
    )
    (found,) = await store.listed()
    assert found.revoked is not None


async def test_there_is_an_end_to_how_many_are_kept(
    server: PrivateValkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(server, tmp_path, most=2) as store:
        ended, _ = await store.create("ended", CALLER)
        await store.create("web", CALLER)
        await store.revoke(ended.id)
        with pytest.raises(StoreFull):
            await store.create("one more", CALLER)

        monkeypatch.setattr(key_store, "ENDED_SECONDS", -1.0)
        await store.create("one more", CALLER)

        assert [key.name for key in await store.listed()] == ["web", "one more"]


async def test_without_its_server_the_last_known_keys_hold_and_then_none(
    server: PrivateValkey, tmp_path: Path
) -> None:
    async with opened(server, tmp_path, stale_seconds=2.0) as store:
        key, _ = await store.create("web", CALLER)
        await kill(server)
        with pytest.raises(StateUnavailable):
            await store.listed()

        assert store.find(key.id) == key

        await until(lambda: is_unavailable(store))

        await server.start()
        await until(lambda: not is_unavailable(store))
        assert store.find(key.id) == key


async def test_keys_that_were_never_read_hold_for_nobody(
    server: PrivateValkey, tmp_path: Path
) -> None:
    await server.start()
    await kill(server)
    url = f"unix://{tmp_path}/nobody.sock"
    state = await State.open(url, data_directory=tmp_path, probe_seconds=0.05)
    store = KeyStore(state)
    await store.start()
    assert is_unavailable(store)
    await store.close()
    await state.close()
