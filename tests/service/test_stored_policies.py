"""Published policies as requests see them, while Redis and other releases come and go.

A real Valkey."""

import asyncio
import json
import os
import signal
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from service import fresh_copy
from service.errors import StateUnavailable
from service.policies import Policies, read_policies
from service.policy import Policy
from service.policy_store import HEADS, PolicyStore
from service.private_valkey import PrivateValkey
from service.state import State
from service.stored_policies import FILE, StoredPolicies, read_seed
from tests.service import event_rig


def text(identity: str = "default", action: str = "block", **more: object) -> str:
    """A policy in YAML, which JSON is."""
    return json.dumps({"version": 1, "id": identity, "rules": [{"action": action}], **more})


@dataclass
class Replica:
    """A service's policies, and its way to publish."""

    policies: StoredPolicies
    store: PolicyStore
    state: State
    labels: list[str]

    @property
    def label(self) -> str:
        """Of what everybody is held to."""
        return self.policies.default.label

    @property
    def is_refusing(self) -> bool:
        """Whether requests get no policy, and so no answer."""
        try:
            _ = self.policies.default
        except StateUnavailable:
            return True
        return False

    async def publish(self, sent: str, expected: int | None = None) -> None:
        """Publishes, and brings it into force here."""
        await self.store.publish(sent, "ann", "", expected)
        await self.policies.refresh()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[PrivateValkey]:
    valkey = PrivateValkey(tmp_path / "server", 64 * 2**20, stop_seconds=0.0)
    await valkey.start()
    yield valkey
    await valkey.stop()


@asynccontextmanager
async def replica(
    server: PrivateValkey | str,
    directory: Path,
    *,
    stale_seconds: float = 3600.0,
    seed: Policies | None = None,
    seeds: dict[str, str] | None = None,
    default_id: str = "default",
    refresh_seconds: float = 0.05,
) -> AsyncIterator[Replica]:
    """A service with its data in ``directory``."""
    await asyncio.to_thread(directory.mkdir, exist_ok=True)
    state = await State.open(
        server if isinstance(server, str) else await server.start(),
        data_directory=directory,
        connect_seconds=5.0,
        command_seconds=5.0,
        probe_seconds=0.05,
    )
    store = PolicyStore(state)
    labels: list[str] = []
    policies = StoredPolicies(
        store,
        directory,
        seed or Policies(Policy()),
        seeds or {},
        default_id=default_id,
        refresh_seconds=refresh_seconds,
        stale_seconds=stale_seconds,
        swapped=labels.append,
    )
    await policies.start()
    try:
        yield Replica(policies, store, state, labels)
    finally:
        await policies.close()
        await state.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        # What is waited for has no event of its own.
        while not condition():  # noqa: ASYNC110 - the server has no event
            await asyncio.sleep(0.01)


async def kill(server: PrivateValkey) -> None:
    assert server.process_id is not None
    os.kill(server.process_id, signal.SIGKILL)
    await until(lambda: server.process_id is None)


async def edit(one: Replica, revision: int, **values: Any) -> None:
    """What another release might have written."""
    async with one.state.connected() as redis:
        key = "sg1:{policies}:revisions:default"
        data: Any = await redis.hget(key, str(revision))
        await redis.hset(key, str(revision), json.dumps(json.loads(data) | values))


@pytest.fixture
def whole_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh_copy, "_WHOLE_SECONDS", 0.05)


async def test_an_empty_store_leaves_the_default_of_the_settings(
    server: PrivateValkey, tmp_path: Path
) -> None:
    async with replica(server, tmp_path / "a") as one:
        assert one.label == "default@1"
        assert one.policies.named("strict") is one.policies.default
        assert one.policies.revision_of("strict") is None


async def test_files_seed_an_empty_store_and_only_that(
    server: PrivateValkey, tmp_path: Path
) -> None:
    house, strict = tmp_path / "house.yaml", tmp_path / "strict.yaml"
    house.write_text(text("house"), "utf-8")
    strict.write_text(text("strict"), "utf-8")
    seeds = read_seed(house, [strict])
    seed = read_policies(house, [strict])
    async with replica(server, tmp_path / "a", seed=seed, seeds=seeds, default_id="house") as one:
        assert one.label == "house@1"
        assert one.policies.named("strict").label == "strict@1"
        await one.publish(text("house", "allow"), 1)
        assert one.label == "house@2"

    async with replica(server, tmp_path / "b", seed=seed, seeds=seeds, default_id="house") as two:
        assert two.label == "house@2"


async def test_what_one_replica_publishes_comes_into_force_in_all(
    server: PrivateValkey, tmp_path: Path
) -> None:
    async with replica(server, tmp_path / "a") as one, replica(server, tmp_path / "b") as two:
        held = one.policies.default
        await one.publish(text())
        await one.publish(text("strict"))
        assert one.policies.named("strict").label == "strict@1"
        await until(
            lambda: two.policies.revision_of("strict") == 1 and two.policies.default != held
        )
        # A request that began before keeps what it read.
        assert held == Policy()


async def test_the_label_of_the_default_is_told_when_it_changes(
    server: PrivateValkey, tmp_path: Path
) -> None:
    async with replica(server, tmp_path / "a") as one:
        await one.publish(text())
        await one.publish(text("strict"))
        await one.publish(text(action="allow"), 1)
        assert one.labels == ["default@2"]
        assert one.policies.label == "default@2"
        assert one.policies.counts.swapped == 3


@pytest.mark.parametrize(
    "written",
    [
        {"version": 2},
        {"text": text(colour="red")},
        {"text": text("another")},
        {"text": "rules: ["},
    ],
)
async def test_what_a_later_release_published_leaves_the_one_before_in_force(
    server: PrivateValkey, tmp_path: Path, caplog: pytest.LogCaptureFixture, written: dict[str, Any]
) -> None:
    async with replica(server, tmp_path / "a") as one, replica(server, tmp_path / "b") as two:
        await one.publish(text())
        await one.publish(text(), 1)
        await until(lambda: two.label == "default@2")
        async with one.state.connected() as redis:
            data: Any = await redis.hget("sg1:{policies}:revisions:default", "2")
            third = json.loads(data) | {"revision": 3} | written
            await redis.hset("sg1:{policies}:revisions:default", "3", json.dumps(third))
            await redis.hset(HEADS, "default", "3")
            await redis.incr("sg1:{policies}:changes")

        await one.policies.refresh()
        await until(lambda: two.policies.counts.unreadable == 1)
        for known in (one, two):
            assert known.label == "default@2"
            assert known.policies.counts.unreadable == 1
        # A replica that starts now obeys the same.
        async with replica(server, tmp_path / "c") as three:
            assert three.label == "default@2"
            # And what is published over it comes into force everywhere.
            await three.publish(text(), 3)
            await until(lambda: one.label == two.label == three.label == "default@4")
    assert "revision 3 of the policy default cannot be obeyed here, default@2 is" in caplog.text


async def test_each_unreadable_revision_is_counted_once(
    server: PrivateValkey, tmp_path: Path, whole_often: None
) -> None:
    async with replica(server, tmp_path / "a") as one:
        await one.publish(text())
        await edit(one, 1, version=2)
        await until(lambda: one.policies.counts.unreadable > 0)
        await one.policies.refresh()
        await one.policies.refresh()
        assert one.policies.counts.unreadable == 1
        assert one.policies.named("default").rules[0].severity == 0
        assert one.label == "default@1"


async def test_the_last_known_serve_on_while_redis_is_away_and_no_longer_than_is_said(
    server: PrivateValkey, tmp_path: Path
) -> None:
    async with (
        replica(server, tmp_path / "a") as one,
        replica(server, tmp_path / "b", stale_seconds=0.5) as two,
    ):
        await one.publish(text(action="allow"))
        await one.publish(text(action="allow"), 1)
        await until(lambda: two.label == "default@2")
        await kill(server)

        await until(lambda: two.is_refusing)
        assert one.label == "default@2"
        assert two.policies.label == "default@2"
        with pytest.raises(StateUnavailable, match="away for too long"):
            two.policies.named("default")

        await server.start()
        await until(lambda: not two.is_refusing)
        await one.state.wait_available()
        await one.publish(text(), 2)
        await until(lambda: one.label == two.label == "default@3")


async def test_a_restart_without_redis_has_the_last_known_from_a_private_file(
    server: PrivateValkey, tmp_path: Path
) -> None:
    url = await server.start()
    async with replica(server, tmp_path / "a") as one:
        await one.publish(text())
        await one.publish(text(), 1)
        await one.publish(text("strict"))
    assert stat.S_IMODE((tmp_path / "a" / FILE).stat().st_mode) == 0o600
    await kill(server)

    async with replica(url, tmp_path / "a") as again:
        assert again.label == "default@2"
        assert again.policies.named("strict").label == "strict@1"
        await server.start()
        await again.state.wait_available()
        await again.publish(text(), 2)
        assert again.label == "default@3"
        assert again.policies.counts.swapped == 1


async def test_a_service_that_never_knew_a_policy_answers_nobody_without_redis(
    tmp_path: Path,
) -> None:
    async with replica(f"unix://{tmp_path}/nobody.sock", tmp_path / "a") as one:
        assert one.is_refusing
        assert one.policies.label == "default@1"


@pytest.mark.parametrize(
    "change",
    [
        {"confirmed": time.time() - 7200},
        {"confirmed": "yesterday"},
        {"revisions": [{"version": 2}]},
        {"revisions": 7},
    ],
)
async def test_a_file_that_is_old_or_of_a_later_release_is_not_relied_upon(
    server: PrivateValkey, tmp_path: Path, change: dict[str, object]
) -> None:
    url = await server.start()
    async with replica(server, tmp_path / "a") as one:
        await one.publish(text())
    await kill(server)
    file = tmp_path / "a" / FILE
    file.write_text(json.dumps(json.loads(file.read_bytes()) | change), "utf-8")
    async with replica(url, tmp_path / "a") as again:
        assert again.is_refusing


async def test_keys_of_later_releases_in_the_file_are_passed_over(
    server: PrivateValkey, tmp_path: Path
) -> None:
    url = await server.start()
    async with replica(server, tmp_path / "a") as one:
        await one.publish(text())
        await one.publish(text(), 1)
    await kill(server)
    file = tmp_path / "a" / FILE
    values = json.loads(file.read_bytes())
    values["revisions"][0]["colour"] = values["colour"] = "red"
    # A clock that was ahead when it was written.
    values["confirmed"] += 1e6
    file.write_text(json.dumps(values), "utf-8")
    async with replica(url, tmp_path / "a") as again:
        assert again.label == "default@2"


async def test_a_file_that_cannot_be_written_is_said_once_and_stops_nothing(
    server: PrivateValkey, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a" / FILE).mkdir(parents=True)
    async with replica(server, tmp_path / "a") as one:
        await one.publish(text())
        await one.publish(text(), 1)
        assert one.label == "default@2"
    assert caplog.text.count("cannot be written") == 1


async def test_a_store_that_lost_everything_gets_the_last_known_back(
    server: PrivateValkey, tmp_path: Path, whole_often: None
) -> None:
    async with replica(server, tmp_path / "a", seeds={"default": text(action="allow")}) as one:
        await one.publish(text(), 1)
        await one.publish(text("strict"))
        async with Redis.from_url(await server.start()) as redis:
            await redis.flushall()

        async def has_both() -> bool:
            heads = (await one.store.stored()).heads
            return {head.id for head in heads} == {"default", "strict"}

        await event_rig.until(has_both)
        assert (await one.store.read("default")).text == text()
        await one.policies.refresh()
        assert one.policies.default.rules[0].action.label == "block"


async def test_a_policy_that_is_lost_in_redis_stays_in_force(
    server: PrivateValkey, tmp_path: Path, whole_often: None, caplog: pytest.LogCaptureFixture
) -> None:
    async with replica(server, tmp_path / "a") as one:
        await one.publish(text())
        await one.publish(text("strict"))
        async with one.state.connected() as redis:
            await redis.hdel(HEADS, "strict")
        await until(lambda: "strict is gone from Redis" in caplog.text)
        await one.policies.refresh()
        assert one.policies.named("strict").label == "strict@1"
    assert caplog.text.count("is gone from Redis") == 1


async def test_no_two_write_the_file_at_once_where_a_refresh_was_cancelled(
    server: PrivateValkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, may_go_on = threading.Event(), threading.Event()
    writing: list[int] = []
    fsync = os.fsync

    def slow(handle: int) -> None:
        writing.append(handle)
        waits.set()
        assert may_go_on.wait(10)
        fsync(handle)

    async with replica(server, tmp_path / "a", refresh_seconds=3600.0) as one:
        await one.publish(text())
        await one.store.publish(text(action="allow"), "ann", "", 1)
        monkeypatch.setattr(os, "fsync", slow)
        given_up = asyncio.create_task(one.policies.refresh())
        await asyncio.to_thread(waits.wait, 10)
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        after = asyncio.create_task(one.policies.refresh())
        # Time enough for the second to come to the file, if it may.
        await asyncio.sleep(0.5)
        assert len(writing) == 1
        may_go_on.set()
        await after

        values = json.loads((tmp_path / "a" / FILE).read_bytes())
        assert [revision["revision"] for revision in values["revisions"]] == [2]
        assert one.label == "default@2"
