"""Policies that are published to Redis: revisions, races, bounds, refusals. A real Valkey."""

import asyncio
import contextlib
import json
from typing import Any

import pytest

from service.errors import (
    BadRequest,
    Conflict,
    NotFound,
    SluicegateError,
    StateUnavailable,
    StoreFull,
    TooLarge,
)
from service.policy import Action
from service.policy_store import HEADS, PolicyStore, Revision, RevisionFormatError
from service.state import State


def text(identity: str = "house", action: str = "block", **more: object) -> str:
    """A policy in YAML, which JSON is."""
    return json.dumps({"version": 1, "id": identity, "rules": [{"action": action}], **more})


@pytest.fixture
def store(state: State) -> PolicyStore:
    return PolicyStore(state)


async def heads(store: PolicyStore) -> list[Revision]:
    """What is in force and can be read here, by id."""
    stored = await store.stored()
    found = []
    for head in sorted(stored.heads, key=lambda one: one.id):
        with contextlib.suppress(RevisionFormatError):
            found.append(Revision.from_json(head.data))
    return found


async def edit(state: State, revision: int, **values: Any) -> None:
    """What another release might have written."""
    async with state.connected() as redis:
        key = "sg1:{policies}:revisions:house"
        data: Any = await redis.hget(key, str(revision))
        await redis.hset(key, str(revision), json.dumps(json.loads(data) | values))


async def test_a_policy_is_published_and_read_as_it_was_written(store: PolicyStore) -> None:
    written = "# ours\n" + text()
    assert await store.publish(written, "ann", "the first") == 1

    read = await store.read("house")

    assert (read.revision, read.text, read.author, read.note) == (1, written, "ann", "the first")
    assert read.policy().label == "house@1"
    assert read.policy().rules[0].action is Action.BLOCK


async def test_the_store_numbers_revisions_whatever_the_text_says(store: PolicyStore) -> None:
    await store.publish(text(revision=41), "ann")
    assert await store.publish(text(revision=41), "ann", expected_revision=1) == 2
    assert (await store.read("house")).policy().revision == 2


async def test_who_did_not_see_the_last_revision_publishes_nothing(store: PolicyStore) -> None:
    await store.publish(text(), "ann")
    await store.publish(text(action="allow"), "bob", expected_revision=1)

    for stale in (None, 1, 3):
        with pytest.raises(Conflict, match=r"revision 2 .* is in force") as caught:
            await store.publish(text(), "ann", expected_revision=stale)
        assert caught.value.code == "stale_revision"
    assert len(await store.history("house")) == 2


async def test_a_first_revision_expects_none(store: PolicyStore) -> None:
    with pytest.raises(Conflict, match="there is no policy house"):
        await store.publish(text(), "ann", expected_revision=3)


async def test_of_many_who_publish_at_once_one_does(state: State) -> None:
    replicas = [PolicyStore(state) for _ in range(2)]
    for expected in range(3):
        done = await asyncio.gather(
            *(
                replicas[number % 2].publish(text(), f"author {number}", "", expected)
                for number in range(8)
            ),
            return_exceptions=True,
        )
        assert [one for one in done if isinstance(one, int)] == [expected + 1]
        assert sum(isinstance(one, Conflict) for one in done) == 7
    assert [one.revision for one in await replicas[0].history("house")] == [3, 2, 1]


async def test_going_back_publishes_the_older_text_anew(store: PolicyStore) -> None:
    await store.publish(text(action="block"), "ann")
    await store.publish(text(action="allow"), "ann", expected_revision=1)

    assert await store.rollback("house", 1, "bob") == 3

    read = await store.read("house")
    assert (read.text, read.author, read.note) == (
        text(action="block"),
        "bob",
        "back to revision 1",
    )
    assert [one.revision for one in await store.history("house")] == [3, 2, 1]


async def test_going_back_is_refused_where_somebody_came_between(store: PolicyStore) -> None:
    await store.publish(text(), "ann")
    await store.publish(text(), "ann", expected_revision=1)
    with pytest.raises(Conflict):
        await store.rollback("house", 1, "bob", expected_revision=1)


async def test_the_newest_revisions_are_kept(state: State) -> None:
    store = PolicyStore(state, most_revisions=3)
    for expected in range(6):
        await store.publish(text(), "ann", expected_revision=expected)

    assert [one.revision for one in await store.history("house")] == [6, 5, 4]
    with pytest.raises(NotFound, match="no revision 3"):
        await store.rollback("house", 3, "ann")

    await PolicyStore(state, most_revisions=1).publish(text(), "ann", expected_revision=6)
    assert [one.revision for one in await store.history("house")] == [7]


async def test_there_may_be_so_many_policies(state: State) -> None:
    store = PolicyStore(state, most_policies=2)
    await store.publish(text("one"), "ann")
    await store.publish(text("two"), "ann")
    with pytest.raises(StoreFull):
        await store.publish(text("three"), "ann")
    assert await store.publish(text("two"), "ann", expected_revision=1) == 2
    assert [(one.id, one.revision) for one in await heads(store)] == [("one", 1), ("two", 2)]


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nversion: 1\nid: house\nrules: [{action: allow}]\n"


@pytest.mark.parametrize(
    ("sent", "error", "says"),
    [
        ("rules: [", BadRequest, "line 1: not YAML"),
        ("\x00", BadRequest, "not YAML"),
        ("a: \ud800", BadRequest, "not YAML"),
        ("", BadRequest, "expected a mapping"),
        ("- 1", BadRequest, "expected a mapping"),
        ("version: 1\nid: house", BadRequest, "key rules is missing"),
        ("version: 1\nid: house\nrules: []", BadRequest, "line 1: rules is empty"),
        ("version: 2\nid: house\nrules: [{action: allow}]", BadRequest, "line 1: version"),
        ("version: 1\nid: a/b\nrules: [{action: allow}]", BadRequest, "line 2: id"),
        ("version: 1\nid: a\nid: b\nrules: []", BadRequest, "key id stands twice"),
        (BOMB, BadRequest, "no aliases"),
        ("&a [*a]", BadRequest, "no aliases"),
        ("- " * 30_000, BadRequest, "nested deeper"),
        ("[" * 60_000, BadRequest, "nested deeper"),
        ("#" * 70_000, TooLarge, "longer than 65536 bytes"),
        ("#" + "\u20ac" * 30_000, TooLarge, "longer than 65536 bytes"),
    ],
)
async def test_what_is_no_policy_is_refused_and_not_stored(
    store: PolicyStore, sent: str, error: type[SluicegateError], says: str
) -> None:
    with pytest.raises(error, match=says) as caught:
        await store.publish(sent, "ann")
    assert caught.value.status in (400, 413)
    assert len(caught.value.message) <= 500
    assert await heads(store) == []


@pytest.mark.parametrize(("author", "note"), [("a" * 129, ""), ("ann", "n" * 1001)])
async def test_long_words_are_refused(store: PolicyStore, author: str, note: str) -> None:
    with pytest.raises(BadRequest, match="longer than"):
        await store.publish(text(), author, note)


async def test_what_is_not_there(store: PolicyStore) -> None:
    with pytest.raises(NotFound, match="no such policy"):
        await store.read("house")
    with pytest.raises(NotFound, match="no revision 1"):
        await store.read("house", 1)
    assert await store.history("house") == []


async def test_a_seed_fills_an_empty_store_once(state: State) -> None:
    texts = {"house": text(), "strict": text("strict")}
    done = await asyncio.gather(*(PolicyStore(state).seed(texts, "settings", "") for _ in range(4)))
    assert sorted(done) == [False, False, False, True]

    store = PolicyStore(state)
    assert [(one.id, one.revision) for one in await heads(store)] == [("house", 1), ("strict", 1)]
    assert not await store.seed({"third": text("third")}, "settings", "")
    assert not await PolicyStore(state).seed({}, "settings", "")


async def test_each_change_raises_the_counter(store: PolicyStore) -> None:
    seen = [await store.changes()]
    await store.seed({"strict": text("strict")}, "settings", "")
    seen.append(await store.changes())
    await store.publish(text(), "ann")
    seen.append(await store.changes())
    await store.rollback("house", 1, "ann")
    seen.append(await store.changes())
    assert len(set(seen)) == 4
    assert (await store.stored()).changes == seen[-1]


async def test_what_a_later_release_added_is_passed_over(state: State, store: PolicyStore) -> None:
    await store.publish(text(), "ann")
    before = await store.read("house")
    await edit(state, 1, colour="red")
    assert await store.read("house") == before


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"7", b"{}", b'{"version": 2}', b'{"version": "1"}', b'{"version": 1}']
)
def test_what_cannot_be_read_is_said_to_be_so(data: bytes) -> None:
    with pytest.raises(RevisionFormatError):
        Revision.from_json(data)


async def test_a_revision_of_a_later_release_is_left_out_and_nobody_goes_back_to_it(
    state: State, store: PolicyStore
) -> None:
    await store.publish(text(), "ann")
    await store.publish(text(), "ann", expected_revision=1)
    await edit(state, 2, version=2)

    assert [one.revision for one in await store.history("house")] == [1]
    assert await heads(store) == []
    with pytest.raises(Conflict, match="later release") as caught:
        await store.rollback("house", 2, "ann")
    assert caught.value.code == "policy_unreadable"
    # The way out is to publish over it.
    assert await store.rollback("house", 1, "ann") == 3


def test_a_text_under_another_id_is_not_obeyed() -> None:
    with pytest.raises(RevisionFormatError, match="another id"):
        Revision("strict", 1, text("house"), "", "", 0.0).policy()


async def test_nothing_is_published_while_redis_is_away(state: State, store: PolicyStore) -> None:
    await state.close()
    with pytest.raises(StateUnavailable):
        await store.publish(text(), "ann")


async def test_keys_of_one_script_share_a_node_of_a_cluster(
    state: State, store: PolicyStore
) -> None:
    await store.publish(text(), "ann")
    async with state.connected() as redis:
        names: Any = await redis.keys("*")
        assert HEADS.encode() in names
    assert all(name.startswith(b"sg1:{policies}:") for name in names)
