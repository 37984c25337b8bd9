"""All that uses state, on a real cluster of three nodes.

After each test the nodes must have refused nothing, and the service logged nothing: a key that
leads to the wrong node would be refused there, or by the client, which calls state lost.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.crc import key_slot

from service.caller import Role
from service.errors import Conflict, RateLimited, StateUnavailable, StoreFull
from service.event_index import EventIndex
from service.event_routes import AUDIT, EVENTS, EXPORT, HOURS, EventRoutes
from service.events import Filters
from service.kept_texts import KeptText, hashed_subject
from service.key_store import KeyStore
from service.keys import Limits, Rate, match, parse_token
from service.labels import Labels
from service.policies import Policies
from service.policy import Policy, parse_policy
from service.policy_store import PolicyStore
from service.rate_limits import RateLimits
from service.records import STREAM, Record
from service.response_store import ResponseStore, Stored
from service.reviews import Reviews
from service.state import State
from service.stored_policies import StoredPolicies
from tests.service.event_rig import RECORD, Kept, ids_of, kept, scores, some_records, until
from tests.service.rig import GRAVE, open_rig, shown
from tests.service.route_rig import client_of, data
from tests.service.test_policy_store import text
from tests.service.test_records import Running, drained, records, running, stored
from tests.service.test_shared_verdicts import replica as verdict_replica
from tests.service.valkeys import Server, cluster, standing_by

HASH_KEY = b"k" * 32
ANN = hashed_subject("ann", HASH_KEY)
ROUTE = "/v1/guard"
CALLER: frozenset[Role] = frozenset({"caller"})
DAILY: Limits = {"*": (Rate(5, 86_400), Rate(4, 3600)), ROUTE: (Rate(3, 86_400),)}

# Told to a client that knows no better: a script is not there yet, nor the group of consumers.
_ASKED_AGAIN = {"errorstat_NOSCRIPT", "errorstat_NOGROUP"}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    with asyncio.Runner() as runner:
        made = cluster(tmp_path_factory.mktemp("cluster"), 3)
        yield runner.run(made.__aenter__())
        runner.run(made.__aexit__(None, None, None))


@pytest.fixture
async def url(nodes: list[Server], caplog: pytest.LogCaptureFixture) -> AsyncIterator[str]:
    """Of a cluster that holds nothing."""
    for node in nodes:
        await node.command("FLUSHALL")
        await node.command("CONFIG", "RESETSTAT")
    yield f"redis+cluster://127.0.0.1:{nodes[0].port}"
    for node in nodes:
        async with Redis(port=node.port, protocol=2) as redis:
            assert set(await redis.info("errorstats")) <= _ASKED_AGAIN
    said = [one for one in caplog.get_records("call") if one.levelno >= logging.WARNING]
    assert [one.getMessage() for one in said] == []


async def keys(nodes: list[Server], pattern: str) -> set[str]:
    """Names of keys on all nodes."""
    found = [await node.command("KEYS", pattern) for node in nodes]
    return {key.decode() for of_one in found for key in of_one}


@asynccontextmanager
async def opened(url: str, directory: Path) -> AsyncIterator[State]:
    """A state as a replica has it, with patience for a busy machine."""
    state = await State.open(
        url, data_directory=directory, connect_seconds=10.0, command_seconds=20.0
    )
    try:
        yield state
    finally:
        await state.close()


@pytest.fixture
async def state(url: str, tmp_path: Path) -> AsyncIterator[State]:
    async with opened(url, tmp_path) as made:
        yield made


@pytest.fixture
async def rig(url: str, tmp_path: Path) -> AsyncIterator[Kept]:
    async with kept(url, tmp_path) as made:
        yield made


class TestRecords:
    async def test_they_are_written_indexed_and_found_by_every_filter(self, rig: Kept) -> None:
        written = some_records(60)
        await rig.recorder.write(written)
        await rig.index.catch_up()

        assert await rig.ids() == ids_of(written)
        assert rig.recorder.counts.stored == rig.index.counts.indexed == 60
        sought = next(one for one in written if one.key_id and one.level == "severe")
        asked: dict[str, Any] = {
            "direction": sought.direction,
            "category": None if not sought.categories else sought.categories[0],
            "severity": "moderate",
            "outcome": sought.outcome,
            "route": sought.route,
            "key": sought.key_id,
            "policy": sought.policy,
            "model": sought.model,
            "request_id": sought.request_id,
        }
        for name, value in asked.items():
            filters = Filters(**{name: value})
            assert await rig.ids(filters) == ids_of([one for one in written if filters.match(one)])
        every = Filters(direction="prompt", severity="minor", outcome="blocked")
        found = await rig.every(every, 2)
        assert [event.record.id for event in found] == ids_of(
            [one for one in written if every.match(one)]
        )

    async def test_they_are_counted_by_hours_of_which_each_may_lie_elsewhere(
        self, rig: Kept
    ) -> None:
        written = some_records(20)
        await rig.write(*written)

        now = await rig.events.now()
        counts = await rig.events.hours(now - 30 * 86_400, now + 3600)

        weights = sum(count.weight for count in counts if count.category is None)
        assert weights == sum(one.weight for one in written)

    async def test_what_another_replica_left_is_taken_over_and_all_is_swept(
        self, rig: Kept
    ) -> None:
        await rig.recorder.write(some_records(10))
        assert len(await rig.index.read()) == 10

        other = EventIndex(rig.state, claim_seconds=0.0)
        assert await other.index(await other.claim()) == 10
        await other.sweep()

        assert len(await rig.ids(Filters(direction="prompt"))) + len(
            await rig.ids(Filters(direction="response"))
        ) == len(await rig.ids())

    async def test_the_oldest_make_room_and_the_expired_go(
        self, nodes: list[Server], url: str, tmp_path: Path
    ) -> None:
        async with kept(url, tmp_path, most_records=5, retention_seconds=86_400.0) as rig:
            written = some_records(8)
            await rig.write(*written)
            assert await rig.ids() == ids_of(written[3:])
            assert await keys(nodes, "sg1:{records}:by:*") != set()
        async with kept(url, tmp_path, retention_seconds=0.001) as rig:
            await asyncio.sleep(0.01)
            await rig.recorder.expire()
            await rig.index.sweep()
            assert await rig.ids() == []
            assert await keys(nodes, "sg1:{records}:by:*") == set()

    async def test_operators_ask_for_them(self, rig: Kept) -> None:
        routes = EventRoutes(rig.events, rig.texts, rig.audit, HASH_KEY)
        written = [replace(one, subject=ANN) for one in some_records(4)]
        await rig.write(*written)
        await rig.texts.keep(written[0].id, "a text", "full", ANN)

        async with client_of(routes.all()) as client:
            page = data(await client.get(EVENTS, params={"limit": 3}))
            assert [one["id"] for one in page["data"]] == ids_of(written)[:3]
            rest = data(await client.get(EVENTS, params={"cursor": page["next"]}))
            assert [one["id"] for one in rest["data"]] == ids_of(written)[3:]
            lines = (await client.get(EXPORT)).text.splitlines()
            assert [json.loads(line)["id"] for line in lines] == ids_of(written)
            assert data(await client.get(HOURS))["data"]
            assert data(await client.get(f"{EVENTS}/{written[1].id}"))["id"] == written[1].id
            looked = data(await client.get(f"{EVENTS}/{written[0].id}/text"))
            assert looked["text"] == "a text"
            gone = data(await client.delete(f"{EVENTS}/subjects/ann"))
            assert gone["deleted"] == 4
            assert data(await client.get(EVENTS))["data"] == []
            acts = data(await client.get(AUDIT))["data"]
            assert {one["action"] for one in acts} == {"read_text", "delete_subject", "deleted"}

    async def test_the_next_start_sends_what_the_last_one_left_on_the_disk(
        self, url: str, tmp_path: Path
    ) -> None:
        spool = tmp_path / "spool.jsonl"
        lines = [json.dumps(one.to_fields()) + "\n" for one in records(50)]
        spool.write_text("".join(lines))
        async with running(url, spool) as service:
            await service.recorder.write(records(10))
            await drained(service)
            assert sorted(await stored(service)) == [one.id for one in records(50)]
            assert (service.recorder.counts.stored, service.recorder.counts.duplicates) == (50, 10)


class TestTexts:
    async def test_they_are_kept_looked_at_on_the_record_and_deleted_by_subject(
        self, nodes: list[Server], rig: Kept
    ) -> None:
        records = [replace(one, subject=ANN) for one in some_records(3)]
        await rig.write(*records, replace(RECORD, id="f" * 32))
        for one in records:
            assert await rig.texts.keep(one.id, "mail ann@example.org", "redacted", ANN)

        shown = await rig.texts.look(records[0].id, "key-a")
        assert shown == KeptText("mail [email]", "redacted", False)
        # A text outlives its record, and is found by its subject all the same.
        await rig.texts.keep("gone", "an old one", "full", ANN)
        deleted = await rig.texts.delete_subject(ANN, "key-b")

        assert sorted(deleted) == sorted(["gone", *(one.id for one in records)])
        assert await rig.ids() == ["f" * 32]
        assert await keys(nodes, "sg1:{records}:text*") == set()
        acts, _ = await rig.audit.list()
        assert [(act.key_id, act.action) for act in acts] == [
            ("key-b", "deleted"),
            ("key-b", "delete_subject"),
            ("key-a", "read_text"),
        ]
        assert sorted(acts[0].record_ids) == sorted(deleted)

    async def test_the_oldest_make_room(
        self, nodes: list[Server], url: str, tmp_path: Path
    ) -> None:
        async with kept(url, tmp_path, texts={"most": 2}) as rig:
            for number in range(4):
                assert await rig.texts.keep(str(number), "a text", "full", ANN)
            assert await keys(nodes, "sg1:{records}:text:*") == {
                "sg1:{records}:text:2",
                "sg1:{records}:text:3",
            }
            assert await rig.texts.delete_subject(ANN, None) == ["2", "3"]

    async def test_the_audit_has_pages(self, rig: Kept) -> None:
        await rig.audit.add("key-a", "deleted", [str(number) for number in range(1500)])
        first, following = await rig.audit.list(1)
        rest, end = await rig.audit.list(1, following)
        assert end is None
        assert [*rest[0].record_ids, *first[0].record_ids] == [str(n) for n in range(1500)]


class TestKeys:
    async def test_they_are_made_found_rotated_and_revoked(self, state: State) -> None:
        store = KeyStore(state, refresh_seconds=3600.0)
        await store.start()
        key, token = await store.create("web", CALLER, limits=DAILY)
        assert store.find(key.id) == key

        rotated, new = await store.rotate(key.id, keep_seconds=60.0)
        shown = [parse_token(one) for one in (token, new)]
        assert [match(rotated, one[1]) for one in shown if one] == ["previous", "current"]

        await store.revoke(key.id)
        found = store.find(key.id)
        assert found is not None
        assert found.state(store.now()) == "revoked"
        assert [one.id for one in await store.listed()] == [key.id]
        await store.close()

    async def test_those_that_ended_long_ago_make_room(self, state: State) -> None:
        store = KeyStore(state, most=1)
        old, _ = await store.create("old", CALLER, expires=1.0)
        new, _ = await store.create("new", CALLER)
        assert [one.id for one in await store.listed()] == [new.id]
        assert old.id != new.id
        with pytest.raises(StoreFull):
            await store.create("another", CALLER)

    async def test_limits_of_several_routes_and_times_count_together(self, state: State) -> None:
        limits = RateLimits(state, deadline_seconds=20.0)
        for key in ("key-a", "key-b", "key-c"):
            for _ in range(3):
                await limits.admit(key, ROUTE, DAILY)
            with pytest.raises(RateLimited, match="3/day"):
                await limits.admit(key, ROUTE, DAILY)
            await limits.admit(key, "/v1/another", DAILY)
            with pytest.raises(RateLimited, match="4/hour"):
                await limits.admit(key, "/v1/another", DAILY)
        assert limits.counts.local == 0
        assert limits.counts.shared == 18


class TestPolicies:
    async def test_they_are_published_rolled_back_and_remembered(self, state: State) -> None:
        store = PolicyStore(state, most_revisions=3)
        assert await store.publish(text(), "ann") == 1
        assert await store.publish(text(action="allow"), "bob", "softer", 1) == 2
        with pytest.raises(Conflict, match="revision 2 of the policy house is in force"):
            await store.publish(text(), "carol", expected_revision=1)
        assert await store.rollback("house", 1, "carol") == 3
        assert await store.rollback("house", 2, "carol") == 4

        history = await store.history("house")
        assert [(one.revision, one.note) for one in history] == [
            (4, "back to revision 2"),
            (3, "back to revision 1"),
            (2, "softer"),
        ]
        (head,) = (await store.stored()).heads
        assert [one.revision for one in await store.before(head)] == [3, 2]
        assert (await store.read("house")).policy().label == "house@4"

    async def test_those_of_the_settings_are_put_into_an_empty_store(
        self, state: State, tmp_path: Path
    ) -> None:
        seeds = {name: text(name) for name in ("default", "strict", "other")}
        async with published(state, tmp_path, seeds) as policies:
            assert policies.default.label == "default@1"
            assert policies.named("strict").label == "strict@1"

            store = PolicyStore(state)
            await store.publish(text("strict", "allow"), "ann", expected_revision=1)
            await policies.refresh()
            assert policies.named("strict").label == "strict@2"
            assert policies.counts.unreadable == 0


@asynccontextmanager
async def published(
    state: State, directory: Path, seeds: dict[str, str]
) -> AsyncIterator[StoredPolicies]:
    """The policies of a replica; it asks for changes only when it is told to."""
    policies = StoredPolicies(
        PolicyStore(state),
        directory,
        Policies(Policy()),
        seeds,
        default_id="default",
        refresh_seconds=3600.0,
    )
    await policies.start()
    try:
        yield policies
    finally:
        await policies.close()


class TestReviews:
    async def test_they_are_asked_for_claimed_decided_and_become_examples(self, rig: Kept) -> None:
        flagged: dict[str, Any] = {"level": "moderate", "category_scores": scores("drugs")}
        asked = [replace(RECORD, id=f"{number:032x}", **flagged) for number in range(3)]
        await rig.write(*asked)
        await rig.texts.keep(asked[0].id, "how to?", "full")
        reviews = Reviews(rig.state)
        for one in asked:
            reviews.ask(one, "policy")
        await reviews.close(seconds=20.0)
        assert await reviews.waiting() == 3

        page = await reviews.open(limit=2)
        last = await reviews.open(limit=2, cursor=page.next)
        assert [item.id for item in (*page.items, *last.items)] == [one.id for one in asked]
        await reviews.claim(asked[0].id, "ann")
        with pytest.raises(Conflict, match="another reviewer"):
            await reviews.claim(asked[0].id, "bob")
        await reviews.resolve(asked[0].id, "ann", "overturned", "none")
        await reviews.resolve(asked[1].id, "bob", "confirmed", "moderate", ["drugs"])

        assert (await reviews.one(asked[0].id)).decision is not None
        assert await reviews.waiting() == 1
        assert reviews.counts.missed == 0
        labels = Labels(rig.state, rig.events, rig.texts)
        assert [one.id async for one in labels.all()] == [asked[0].id, asked[1].id]
        # Of the second no text was kept.
        (line,) = [json.loads(line) async for line in labels.export("key-a")]
        assert (line["id"], line["prompt"], line["severity"]) == (asked[0].id, "how to?", 0)

    async def test_the_oldest_make_room(self, state: State) -> None:
        reviews = Reviews(state, most=2)
        for number in range(4):
            assert await reviews.add(replace(RECORD, id=f"{number:032x}"), "sampled")
        assert [int(item.id) for item in (await reviews.open()).items] == [2, 3]
        assert reviews.counts.dropped == 2


class TestCaches:
    async def test_responses_are_kept_found_deleted_and_bounded(self, state: State) -> None:
        store = ResponseStore(state, most=5)
        for number in range(8):
            assert await store.keep("owner", {"id": f"resp_{number}"}, [{"n": number}])
        assert await store.delete("owner", "resp_7")
        found = [await store.find("owner", f"resp_{number}") for number in range(8)]
        assert [one is not None for one in found] == [False] * 3 + [True] * 4 + [False]
        assert found[3] == Stored({"id": "resp_3"}, ({"n": 3},))

    async def test_verdicts_of_all_slots_are_shared(self, url: str, tmp_path: Path) -> None:
        async with (
            verdict_replica(url, tmp_path) as one,
            verdict_replica(url, tmp_path) as other,
        ):
            texts = [f"w{number}" for number in range(40)]
            assert await other.judge(*texts[:1]) == await one.judge(*texts[:1])
            first = await one.judge(*texts)
            assert await other.judge(*texts) == first
            assert one.judged + other.judged == 40
            assert one.shared.dropped == other.shared.dropped == 0


@dataclass
class Replica:
    """What one service has over its own connections."""

    kept: Kept
    keys: KeyStore
    limits: RateLimits
    store: PolicyStore
    policies: StoredPolicies
    reviews: Reviews
    responses: ResponseStore


@asynccontextmanager
async def replica(url: str, directory: Path) -> AsyncIterator[Replica]:
    """It asks for changes of others only when it is told to."""
    async with (
        kept(url, directory) as made,
        published(made.state, directory, {"default": text("default")}) as policies,
    ):
        keys = KeyStore(made.state, refresh_seconds=3600.0)
        await keys.start()
        yield Replica(
            made,
            keys,
            RateLimits(made.state, deadline_seconds=20.0),
            PolicyStore(made.state),
            policies,
            Reviews(made.state),
            ResponseStore(made.state),
        )
        await keys.close()


class TestTwoReplicas:
    async def test_what_one_writes_the_other_sees(self, url: str, tmp_path: Path) -> None:
        async with (
            replica(url, tmp_path / "one") as one,
            replica(url, tmp_path / "other") as other,
        ):
            key, _ = await one.keys.create("web", CALLER, limits=DAILY)
            await other.keys.refresh()
            assert other.keys.find(key.id) == key
            await other.keys.revoke(key.id)
            await one.keys.refresh()
            assert (await one.keys.listed())[0].revoked is not None

            left = [await each.limits.admit(key.id, ROUTE, DAILY) for each in (one, other, one)]
            assert [headers["x-ratelimit-remaining-requests"] for headers in left] == [
                "2",
                "1",
                "0",
            ]
            with pytest.raises(RateLimited):
                await other.limits.admit(key.id, ROUTE, DAILY)

            await one.store.publish(text("default", "allow"), "ann", expected_revision=1)
            await other.policies.refresh()
            assert other.policies.default.label == "default@2"
            await other.store.rollback("default", 1, "bob")
            await one.policies.refresh()
            assert one.policies.default.label == "default@3"
            assert [one.author for one in await one.store.history("default")][:2] == ["bob", "ann"]

            flagged = replace(RECORD, level="severe", subject=ANN)
            await one.kept.write(flagged)
            assert await other.kept.ids(Filters(severity="severe")) == [flagged.id]
            # It is indexed once.
            await other.kept.index.catch_up()
            assert one.kept.index.counts.indexed + other.kept.index.counts.indexed == 1
            await other.kept.write(flagged)
            assert other.kept.recorder.counts.duplicates == 1
            await one.kept.texts.keep(flagged.id, "a text", "full", ANN)
            assert await other.kept.texts.look(flagged.id, None) is not None
            assert await other.kept.texts.delete_subject(ANN, None) == [flagged.id]
            assert await one.kept.ids() == []

            await one.reviews.add(flagged, "policy")
            await other.reviews.claim(flagged.id, "ann")
            with pytest.raises(Conflict, match="another reviewer"):
                await one.reviews.claim(flagged.id, "bob")
            await one.responses.keep("owner", {"id": "resp_1"}, [])
            assert await other.responses.find("owner", "resp_1") is not None


async def test_what_is_kept_lies_on_all_nodes(nodes: list[Server], rig: Kept) -> None:
    await rig.write(RECORD)
    await rig.texts.look(RECORD.id, None)
    await KeyStore(rig.state).create("web", CALLER)
    await PolicyStore(rig.state).publish(text(), "ann")
    await Reviews(rig.state).add(RECORD, "policy")
    await ResponseStore(rig.state).keep("owner", {"id": "resp_1"}, [])

    assert all([await keys([node], "*") for node in nodes])


async def test_a_whole_service_works_on_it(url: str, tmp_path: Path) -> None:
    policy = parse_policy(text("default"))
    settings: dict[str, Any] = {"state_url": url, "cache_url": url, "policy_source": "store"}
    async with open_rig(tmp_path, policy, **settings) as rig:
        assert shown(await rig.send(GRAVE))[0] == "blocked"
        routes = rig.runtime.event_routes.all()
        async with client_of(routes) as client:

            async def is_found() -> bool:
                asked = {"severity": "severe", "outcome": "blocked"}
                page = data(await client.get(EVENTS, params=asked))
                return len(page["data"]) == 1

            await until(is_found, 30.0)
        assert rig.runtime.policies.label == "default@1"
        assert rig.metric("state_up") == 1


async def test_where_a_replica_takes_the_place_of_a_node_records_are_sent_on(
    tmp_path: Path,
) -> None:
    (tmp_path / "nodes").mkdir()
    async with cluster(tmp_path / "nodes", 3) as nodes:
        first = nodes[key_slot(STREAM.encode()) * 3 // 16384]
        async with standing_by(tmp_path / "spare", first):
            places = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
            async with running(f"redis+cluster://{places}", tmp_path / "spool.jsonl") as service:
                await service.recorder.write(records(2))

                # One that hangs refuses nothing, so that nobody is told to ask another.
                with first.paused():
                    for one in records(6)[2:]:
                        await service.recorder.write([one])
                    assert service.recorder.counts.spooled > 0
                    await until(lambda: is_stored(service, records(6)), 60.0)
                assert service.recorder.counts.lost == 0


async def is_stored(service: Running, written: list[Record]) -> bool:
    """Whether Redis holds just these."""
    try:
        return sorted(await stored(service)) == [record.id for record in written]
    except StateUnavailable:
        return False
