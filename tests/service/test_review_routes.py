"""Reviews over HTTP: what waits, who has it, what was decided."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from service.labels import STREAM
from service.records import Record
from service.review_routes import ReviewRoutes
from service.reviews import Reviews
from service.state import State
from tests.guards import CANARY
from tests.service.event_rig import RECORD, scores
from tests.service.route_rig import client_of, data, refusal


def record(number: int = 0, **values: Any) -> Record:
    """A flagged one."""
    values = {"level": "moderate", "category_scores": scores("violence")} | values
    return replace(RECORD, id=f"{number:032x}", **values)


def path(number: int = 0, what: str = "") -> str:
    return f"/v1/reviews/{record(number).id}{what}"


@pytest.fixture
def reviews(state: State) -> Reviews:
    return Reviews(state)


@pytest.fixture
async def ann(reviews: Reviews) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(ReviewRoutes(reviews).all(), "ann") as made:
        yield made


@pytest.fixture
async def bob(reviews: Reviews) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(ReviewRoutes(reviews).all(), "bob") as made:
        yield made


async def ids(client: httpx.AsyncClient, **asked: Any) -> list[int]:
    """Numbers of the open items that match."""
    page = data(await client.get("/v1/reviews", params=asked))
    return [int(item["id"], 16) for item in page["data"]]


def test_only_reviewers_review(reviews: Reviews) -> None:
    assert {role for _, _, _, role in ReviewRoutes(reviews).all()} == {"reviewer"}


async def test_what_waits_longest_comes_first_in_pages(
    reviews: Reviews, ann: httpx.AsyncClient
) -> None:
    for number in range(25):
        await reviews.add(record(number), "policy")

    found: list[str] = []
    query: dict[str, Any] = {"limit": 10}
    while True:
        page = data(await ann.get("/v1/reviews", params=query))
        assert page["waiting"] == 25
        found += [item["id"] for item in page["data"]]
        if page["next"] is None:
            break
        query["cursor"] = page["next"]

    assert found == [record(number).id for number in range(25)]


async def test_an_item_shows_scores_and_no_text(reviews: Reviews, ann: httpx.AsyncClient) -> None:
    await reviews.add(record(key_id="key-1"), "policy")

    (item,) = data(await ann.get("/v1/reviews"))["data"]

    assert item == data(await ann.get(path()))
    assert item == {
        "id": record().id,
        "reason": "policy",
        "time": RECORD.time,
        "request_id": "request-1",
        "direction": "prompt",
        "level": "moderate",
        "severity_score": 0.1,
        "categories": ["violence"],
        "policy": "default@1",
        "guard": "guard@1",
        "route": "/v1/chat/completions",
        "outcome": "allowed",
        "key": "key-1",
        "claim": None,
        "decision": None,
    }


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"reason": "borderline"}, [1]),
        ({"direction": "response"}, [1]),
        ({"category": "violence"}, [0, 1]),
        ({"severity": "severe"}, [1]),
        ({"policy": "strict"}, [2]),
        ({"key": "key-a"}, [0]),
        ({"free": "true"}, [0, 2]),
        ({"free": "false"}, [0, 1, 2]),
    ],
)
async def test_open_items_are_found_by_what_they_are(
    reviews: Reviews, ann: httpx.AsyncClient, asked: dict[str, str], expected: list[int]
) -> None:
    await reviews.add(record(0, key_id="key-a"), "policy")
    await reviews.add(record(1, level="severe", direction="response"), "borderline")
    await reviews.add(record(2, level="none", policy="strict@4"), "sampled")
    await reviews.claim(record(1).id, "bob")
    assert await ids(ann, **asked) == expected


async def test_who_claims_an_item_has_it(
    reviews: Reviews, ann: httpx.AsyncClient, bob: httpx.AsyncClient
) -> None:
    await reviews.add(record(), "policy")
    claimed = data(await ann.post(path(what="/claim")))
    assert claimed["claim"]["reviewer"] == "ann"

    assert refusal(await bob.post(path(what="/claim")))[:2] == (409, "review_claimed")
    decision = {"outcome": "confirmed", "severity": "moderate"}
    answer = await bob.post(path(what="/decision"), json=decision)
    assert refusal(answer)[:2] == (409, "review_claimed")

    longer = data(await ann.post(path(what="/claim"), json={"seconds": 7200.5}))
    assert longer["claim"]["until"] > claimed["claim"]["until"] + 3600
    data(await ann.post(path(what="/claim"), json={"seconds": 0}))
    assert data(await bob.post(path(what="/claim")))["claim"]["reviewer"] == "bob"


async def test_a_decision_closes_the_item_and_makes_a_label(
    reviews: Reviews, state: State, ann: httpx.AsyncClient, bob: httpx.AsyncClient
) -> None:
    await reviews.add(record(), "policy")
    decision = {
        "outcome": "overturned",
        "severity": "minor",
        "categories": ["violence", "drugs"],
        "refusal": None,
        "note": "a joke",
    }

    item = data(await ann.post(path(what="/decision"), json=decision))

    assert item["decision"].pop("time") > 1.7e9
    assert item["decision"] == {
        "reviewer": "ann",
        "outcome": "overturned",
        "severity": "minor",
        "categories": ["violence", "drugs"],
        "note": "a joke",
    }
    assert await ids(ann) == []
    assert data(await ann.get(path()))["decision"]["severity"] == "minor"
    # A lost answer may be asked for again; somebody else comes too late.
    assert (await ann.post(path(what="/decision"), json=decision)).status_code == 200
    late = await bob.post(path(what="/decision"), json=decision)
    assert refusal(late)[:2] == (409, "review_decided")
    async with state.connected() as redis:
        assert await redis.xlen(STREAM) == 1


@pytest.mark.parametrize(
    ("what", "body", "param"),
    [
        ("/claim", {"seconds": -1}, "seconds"),
        ("/claim", {"seconds": 86_401}, "seconds"),
        ("/claim", {"seconds": True}, "seconds"),
        ("/claim", {"seconds": "9"}, "seconds"),
        ("/claim", {CANARY: 9}, None),
        ("/decision", {}, "outcome"),
        ("/decision", {"outcome": "confirmed"}, "severity"),
        ("/decision", {"outcome": CANARY, "severity": "minor"}, "outcome"),
        ("/decision", {"outcome": "confirmed", "severity": 1}, "severity"),
        (
            "/decision",
            {"outcome": "confirmed", "severity": "minor", "categories": [1]},
            "categories",
        ),
        (
            "/decision",
            {"outcome": "confirmed", "severity": "minor", "categories": "drugs"},
            "categories",
        ),
        ("/decision", {"outcome": "confirmed", "severity": "minor", "refusal": 1}, "refusal"),
    ],
)
async def test_what_cannot_be_is_said_in_a_sentence(
    reviews: Reviews, ann: httpx.AsyncClient, what: str, body: dict[str, Any], param: str | None
) -> None:
    await reviews.add(record(), "policy")
    answer = await ann.post(path(what=what), json=body)
    assert refusal(answer) == (400, "invalid_request", param)
    assert CANARY not in answer.text
    assert data(await ann.get(path()))["claim"] is None


@pytest.mark.parametrize(
    "query",
    ["reason=odd", "free=yes", "limit=0", "limit=201", "cursor=x", "key=", "severity=bad"],
)
async def test_a_bad_filter_is_named(ann: httpx.AsyncClient, query: str) -> None:
    answer = await ann.get(f"/v1/reviews?{query}")
    assert refusal(answer) == (400, "invalid_request", query.partition("=")[0])


@pytest.mark.parametrize(
    ("query", "param", "says"),
    [
        (f"{CANARY}=1", None, "it takes reason, direction, category, severity, free, policy, key"),
        ("key=a&key=b", "key", "key is given twice"),
        ("key=" + "x" * 257, "key", "1 to 256 characters"),
    ],
)
async def test_a_query_that_cannot_be_read_is_named(
    ann: httpx.AsyncClient, query: str, param: str | None, says: str
) -> None:
    answer = await ann.get(f"/v1/reviews?{query}")
    assert refusal(answer) == (400, "invalid_request", param)
    assert says in answer.json()["error"]["message"]
    assert CANARY not in answer.text


async def test_what_is_not_there(ann: httpx.AsyncClient) -> None:
    decision = {"outcome": "confirmed", "severity": "minor"}
    for identity in ("nobody", "x" * 300):
        for answer in (
            await ann.get(f"/v1/reviews/{identity}"),
            await ann.post(f"/v1/reviews/{identity}/claim"),
            await ann.post(f"/v1/reviews/{identity}/decision", json=decision),
        ):
            assert refusal(answer)[:2] == (404, "review_not_found")


async def test_where_keys_are_off_everybody_is_one_reviewer(reviews: Reviews) -> None:
    await reviews.add(record(), "policy")
    async with client_of(ReviewRoutes(reviews).all(), None) as client:
        item = data(await client.post(path(what="/claim")))
    assert item["claim"]["reviewer"] == "anonymous"
