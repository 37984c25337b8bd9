"""Records to look at: added once, claimed, decided, bounded. A real Valkey."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from service.errors import BadRequest, Conflict, NotFound, StateUnavailable
from service.labels import STREAM
from service.records import Record
from service.review_items import Outcome, Reason, Review, ReviewFilters
from service.reviews import DECIDED, ITEMS, OPEN, Reviews
from service.state import State
from tests.service.event_rig import RECORD, scores, until

VIOLENCE = scores("violence")


def record(number: int = 0, **values: Any) -> Record:
    """A flagged one."""
    values = {"level": "moderate", "category_scores": VIOLENCE} | values
    return replace(RECORD, id=f"{number:032x}", **values)


@pytest.fixture
def reviews(state: State) -> Reviews:
    return Reviews(state)


async def ids(reviews: Reviews, **asked: Any) -> list[int]:
    """Numbers of the open items that match."""
    page = await reviews.open(ReviewFilters(**asked), 200)
    return [int(item.id, 16) for item in page.items]


async def edit(state: State, identity: str, **values: Any) -> None:
    """What another release might have written."""
    async with state.connected() as redis:
        data: Any = await redis.hget(ITEMS, identity)
        await redis.hset(ITEMS, identity, json.dumps(json.loads(data) | values))


async def labels(state: State) -> list[dict[str, Any]]:
    async with state.connected() as redis:
        found: Any = await redis.xrange(STREAM)
    return [json.loads(values[b"data"]) for _, values in found]


async def test_a_record_is_added_once(state: State, reviews: Reviews) -> None:
    assert await reviews.add(record(severity_score=0.1000049), "policy")
    assert not await reviews.add(record(), "reported")
    assert not await Reviews(state).add(record(), "policy")

    (item,) = (await reviews.open()).items
    assert item == Review(
        id=record().id,
        reason="policy",
        time=RECORD.time,
        request_id="request-1",
        direction="prompt",
        level="moderate",
        severity_score=0.1,
        categories=("violence",),
        policy="default@1",
        guard="guard@1",
        route="/v1/chat/completions",
        outcome="allowed",
        key_id=None,
    )
    assert await reviews.waiting() == 1
    assert reviews.counts.added == 1


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"reason": "borderline"}, [1]),
        ({"direction": "response"}, [1]),
        ({"category": "violence"}, [0, 1]),
        ({"severity": "none"}, [0, 1, 2]),
        ({"severity": "moderate"}, [0, 1]),
        ({"severity": "severe"}, [1]),
        ({"policy": "strict"}, [2]),
        ({"policy": "strict@4"}, [2]),
        ({"policy": "strict@5"}, []),
        ({"key": "key-a"}, [0]),
        ({"direction": "response", "reason": "policy"}, []),
    ],
)
async def test_open_items_are_found_by_what_they_are(
    reviews: Reviews, asked: dict[str, str], expected: list[int]
) -> None:
    await reviews.add(record(0, key_id="key-a"), "policy")
    await reviews.add(record(1, level="severe", direction="response"), "borderline")
    await reviews.add(record(2, level="none", policy="strict@4"), "sampled")
    await reviews.add(record(3, level=None), "policy")
    assert await ids(reviews, **asked) == expected


async def test_pages_hold_each_item_once_whatever_comes_between(reviews: Reviews) -> None:
    kinds: tuple[Reason, Reason] = ("policy", "reported")
    for number in range(600):
        await reviews.add(record(number), kinds[number % 2])
    found: list[int] = []
    cursor: str | None = None
    while True:
        page = await reviews.open(ReviewFilters(reason="policy"), 70, cursor)
        assert len(page.items) <= 70
        found += [int(item.id, 16) for item in page.items]
        cursor = page.next
        if cursor is None:
            break
        await reviews.add(record(1000 + len(found)), "sampled")
        await reviews.resolve(page.items[0].id, "ann", "confirmed", "moderate", ["violence"])
    assert found == list(range(0, 600, 2))


async def test_a_page_that_is_just_full_is_the_last(reviews: Reviews) -> None:
    for number in range(3):
        await reviews.add(record(number), "policy")
    page = await reviews.open(limit=3)
    assert (len(page.items), page.next) == (3, None)


@pytest.mark.parametrize(
    "cursor", ["", "r1.", "r1.-5", "e1.0", "r1." + "9" * 40, "r1.0 WITHSCORES"]
)
async def test_a_cursor_that_is_none_of_ours(reviews: Reviews, cursor: str) -> None:
    with pytest.raises(BadRequest, match="cursor"):
        await reviews.open(cursor=cursor)


async def test_one_reviewer_at_a_time_has_an_item(reviews: Reviews) -> None:
    await reviews.add(record(0), "policy")
    await reviews.add(record(1), "policy")
    claimed = await reviews.claim(record(0).id, "ann", 600)
    assert claimed.reviewer == "ann"

    with pytest.raises(Conflict) as caught:
        await reviews.claim(record(0).id, "bob")
    assert caught.value.code == "review_claimed"
    with pytest.raises(Conflict):
        await reviews.resolve(record(0).id, "bob", "confirmed", "moderate")
    assert await ids(reviews, is_free_for="bob") == [1]
    assert await ids(reviews, is_free_for="ann") == [0, 1]

    longer = await reviews.claim(record(0).id, "ann", 6000)
    assert longer.claimed_until > claimed.claimed_until
    await reviews.claim(record(0).id, "ann", 0)
    assert (await reviews.claim(record(0).id, "bob")).reviewer == "bob"


async def test_a_claim_ends_by_itself(reviews: Reviews) -> None:
    await reviews.add(record(), "policy")
    await reviews.claim(record().id, "ann", 0.5)

    async def is_free() -> bool:
        return await ids(reviews, is_free_for="bob") == [0]

    await until(is_free)
    assert (await reviews.claim(record().id, "bob")).reviewer == "bob"


@pytest.mark.parametrize("seconds", [-1.0, 86_401.0, float("inf"), float("nan")])
async def test_nobody_has_an_item_for_ever(reviews: Reviews, seconds: float) -> None:
    await reviews.add(record(), "policy")
    with pytest.raises(BadRequest, match="from 0 to 86400"):
        await reviews.claim(record().id, "ann", seconds)
    assert (await reviews.claim(record().id, "bob")).reviewer == "bob"


async def test_what_is_asked_for_is_added_behind_and_before_it_closes(
    state: State, reviews: Reviews
) -> None:
    for number in range(50):
        reviews.ask(record(number), "policy")
    assert reviews.counts.added == 0

    await reviews.close()

    assert await ids(Reviews(state)) == list(range(50))
    assert (reviews.counts.added, reviews.counts.missed) == (50, 0)


async def test_no_more_than_so_many_are_asked_for_at_once(state: State) -> None:
    reviews = Reviews(state, waiting_items=3)
    for number in range(5):
        reviews.ask(record(number), "policy")
    assert reviews.counts.missed == 2
    await reviews.close()
    assert await ids(reviews) == [0, 1, 2]


async def test_what_is_asked_for_while_redis_is_away_is_counted(
    state: State, reviews: Reviews
) -> None:
    await state.close()
    reviews.ask(record(), "policy")
    await reviews.close()
    assert reviews.counts.missed == 1


async def test_of_many_who_claim_at_once_one_has_it(state: State, reviews: Reviews) -> None:
    await reviews.add(record(), "policy")
    replicas = [reviews, Reviews(state)]
    done = await asyncio.gather(
        *(replicas[number % 2].claim(record().id, f"r{number}") for number in range(8)),
        return_exceptions=True,
    )
    (won,) = [one for one in done if isinstance(one, Review)]
    assert sum(isinstance(one, Conflict) for one in done) == 7
    assert (await reviews.one(record().id)).reviewer == won.reviewer


async def test_a_decision_closes_the_item_and_writes_its_label(
    state: State, reviews: Reviews
) -> None:
    await reviews.add(record(), "policy")
    await reviews.claim(record().id, "ann")
    await reviews.resolve(
        record().id, "ann", "overturned", "minor", ["drugs", "violence"], "a joke", refusal=False
    )

    assert await ids(reviews) == []
    decision = (await reviews.one(record().id)).decision
    assert decision is not None
    assert (decision.outcome, decision.severity, decision.note) == ("overturned", "minor", "a joke")
    # In the taxonomy's order.
    assert decision.categories == ("violence", "drugs")
    (label,) = await labels(state)
    assert label["id"] == record().id
    assert (label["role"], label["severity"]) == ("prompt", 1)
    assert label["categories"] == ["violence", "drugs"]
    assert label["refusal"] is False
    assert (label["outcome"], label["reviewer"]) == ("overturned", "ann")
    assert (reviews.counts.confirmed, reviews.counts.overturned) == (0, 1)


async def test_the_same_decision_sent_again_changes_nothing(state: State, reviews: Reviews) -> None:
    await reviews.add(record(), "policy")
    first = await reviews.resolve(record().id, "ann", "confirmed", "severe", ["violence"])
    assert await reviews.resolve(record().id, "ann", "confirmed", "severe", ["violence"]) == first
    with pytest.raises(Conflict) as caught:
        await reviews.resolve(record().id, "bob", "confirmed", "severe", ["violence"])
    assert caught.value.code == "review_decided"
    with pytest.raises(Conflict):
        await reviews.claim(record().id, "ann")
    assert not await reviews.add(record(), "reported")
    assert len(await labels(state)) == 1
    assert reviews.counts.confirmed == 1


async def test_of_many_who_decide_at_once_one_does(state: State, reviews: Reviews) -> None:
    await reviews.add(record(), "policy")
    replicas = [reviews, Reviews(state)]
    done = await asyncio.gather(
        *(
            replicas[number % 2].resolve(record().id, f"r{number}", "confirmed", "severe")
            for number in range(8)
        ),
        return_exceptions=True,
    )
    (won,) = [one for one in done if isinstance(one, Review)]
    assert sum(isinstance(one, Conflict) for one in done) == 7
    (label,) = await labels(state)
    assert won.decision is not None
    assert label["reviewer"] == won.decision.reviewer
    assert sum(one.counts.confirmed for one in replicas) == 1


@pytest.mark.parametrize(
    ("outcome", "severity", "categories", "note", "param"),
    [
        ("maybe", "minor", [], "", "outcome"),
        ("confirmed", "grave", [], "", "severity"),
        ("confirmed", "minor", ["kindness"], "", "categories"),
        ("overturned", "none", ["drugs"], "", "categories"),
        ("confirmed", "minor", [], "n" * 1001, "note"),
        ("confirmed", "none", [], "", "outcome"),
        ("overturned", "moderate", ["violence"], "", "outcome"),
    ],
)
async def test_decisions_that_contradict_themselves_are_refused(
    state: State,
    reviews: Reviews,
    outcome: Outcome,
    severity: str,
    categories: list[str],
    note: str,
    param: str,
) -> None:
    await reviews.add(record(), "policy")
    with pytest.raises(BadRequest) as caught:
        await reviews.resolve(record().id, "ann", outcome, severity, categories, note)
    assert caught.value.param == param
    assert await ids(reviews) == [0]
    assert await labels(state) == []


@pytest.mark.parametrize("name", ["", "a" * 129])
async def test_a_reviewer_has_a_name(reviews: Reviews, name: str) -> None:
    await reviews.add(record(), "policy")
    with pytest.raises(BadRequest, match="reviewer"):
        await reviews.claim(record().id, name)
    with pytest.raises(BadRequest, match="reviewer"):
        await reviews.resolve(record().id, name, "confirmed", "severe")


async def test_what_the_guard_did_not_judge_may_be_decided_either_way(reviews: Reviews) -> None:
    await reviews.add(record(level=None), "policy")
    await reviews.resolve(record().id, "ann", "confirmed", "none")
    assert reviews.counts.confirmed == 1


async def test_what_is_not_there(reviews: Reviews) -> None:
    for asked in (
        reviews.one("nobody"),
        reviews.claim("nobody", "ann"),
        reviews.resolve("nobody", "ann", "confirmed", "none"),
    ):
        with pytest.raises(NotFound):
            await asked


async def test_decided_items_make_room_first_and_then_the_oldest(
    state: State, reviews: Reviews
) -> None:
    small = Reviews(state, most=3)
    for number in range(3):
        await small.add(record(number), "policy")
    await small.resolve(record(1).id, "ann", "confirmed", "severe")

    await small.add(record(3), "policy")
    assert await ids(small) == [0, 2, 3]
    assert small.counts.dropped == 0
    with pytest.raises(NotFound):
        await small.one(record(1).id)

    await small.add(record(4), "policy")
    assert await ids(small) == [2, 3, 4]
    assert small.counts.dropped == 1
    assert len(await labels(state)) == 1

    await Reviews(state, most=1).add(record(5), "policy")
    assert await ids(small) == [5]


async def test_items_are_kept_so_long(state: State) -> None:
    reviews = Reviews(state, open_seconds=1000, decided_seconds=5000)
    for number in range(4):
        await reviews.add(record(number), "policy")
    for number in (2, 3):
        await reviews.resolve(record(number).id, "ann", "confirmed", "severe")
    async with state.connected() as redis:
        # As if they had come earlier.
        await redis.zincrby(OPEN, -2000e6, record(0).id)
        await redis.zincrby(DECIDED, -2000e6, record(2).id)
        await redis.zincrby(DECIDED, -6000e6, record(3).id)

    await reviews.add(record(4), "policy")

    assert await ids(reviews) == [1, 4]
    assert reviews.counts.dropped == 1
    assert (await reviews.one(record(2).id)).decision is not None
    with pytest.raises(NotFound):
        await reviews.one(record(3).id)
    async with state.connected() as redis:
        assert await redis.hlen(ITEMS) == 3


async def test_places_differ_where_the_clock_was_set_back(state: State, reviews: Reviews) -> None:
    await reviews.add(record(0), "policy")
    async with state.connected() as redis:
        await redis.zincrby(OPEN, 5000e6, record(0).id)
    await reviews.add(record(1), "policy")
    await reviews.add(record(2), "policy")
    first = await reviews.open(limit=1)
    rest = await reviews.open(cursor=first.next)
    assert [int(item.id, 16) for item in (*first.items, *rest.items)] == [0, 1, 2]


async def test_keys_of_a_later_release_outlive_a_change(state: State, reviews: Reviews) -> None:
    await reviews.add(record(), "policy")
    await edit(state, record().id, colour="red", tags=[])
    await reviews.claim(record().id, "ann")
    await reviews.resolve(record().id, "ann", "confirmed", "severe")
    async with state.connected() as redis:
        data: Any = await redis.hget(ITEMS, record().id)
    assert json.loads(data)["colour"] == "red"
    assert json.loads(data)["tags"] == []


async def test_items_of_a_later_release_are_left_to_it(state: State, reviews: Reviews) -> None:
    await reviews.add(record(0), "policy")
    await reviews.add(record(1), "policy")
    await edit(state, record(0).id, version=2)
    assert await ids(reviews) == [1]
    with pytest.raises(Conflict, match="later release"):
        await reviews.claim(record(0).id, "ann")


async def test_nothing_waits_for_redis_that_is_away(state: State, reviews: Reviews) -> None:
    await state.close()
    assert not await reviews.add(record(), "policy")
    assert reviews.counts.missed == 1
    with pytest.raises(StateUnavailable):
        await reviews.open()
