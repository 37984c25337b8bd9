"""Policies that are published over HTTP: what is in force, what was, races, going back."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.audit import Audit
from service.policies import Policies
from service.policy import Policy
from service.policy_routes import PolicyRoutes
from service.policy_store import PolicyStore
from service.state import State
from service.stored_policies import StoredPolicies
from tests.guards import CANARY
from tests.service.route_rig import client_of, data, refusal


def text(identity: str = "house", action: str = "block", **more: object) -> str:
    """A policy in YAML, which JSON is."""
    return json.dumps({"version": 1, "id": identity, "rules": [{"action": action}], **more})


@pytest.fixture
async def policies(state: State, tmp_path: Path) -> AsyncIterator[StoredPolicies]:
    """Those in force; they learn of nothing by themselves within a test."""
    made = StoredPolicies(
        PolicyStore(state),
        tmp_path,
        Policies(Policy()),
        {},
        default_id="house",
        refresh_seconds=3600.0,
    )
    await made.start()
    yield made
    await made.close()


@pytest.fixture
async def client(state: State, policies: StoredPolicies) -> AsyncIterator[httpx.AsyncClient]:
    routes = PolicyRoutes(PolicyStore(state), policies, Audit(state))
    async with client_of(routes.all()) as made:
        yield made


async def put(
    client: httpx.AsyncClient, sent: str, expected: int | None = None, identity: str = "house"
) -> httpx.Response:
    body = {"text": sent, "expected_revision": expected, "note": "why"}
    return await client.put(f"/v1/policies/{identity}", json=body)


async def acts(state: State) -> list[tuple[str | None, str, tuple[str, ...]]]:
    """Who did what to which, oldest first."""
    found, _ = await Audit(state).list()
    return [(act.key_id, act.action, act.record_ids) for act in reversed(found)]


def test_viewers_read_and_publishers_change(state: State) -> None:
    routes = PolicyRoutes(PolicyStore(state), Policies(Policy()), Audit(state)).all()
    assert {(method, role) for method, _, _, role in routes} == {
        ("GET", "viewer"),
        ("PUT", "publisher"),
        ("POST", "publisher"),
    }


async def test_what_is_published_is_in_force_here_at_once(
    client: httpx.AsyncClient, policies: StoredPolicies
) -> None:
    assert data(await put(client, text())) == {
        "object": "policy.published",
        "id": "house",
        "revision": 1,
    }
    assert policies.default.label == "house@1"

    data(await put(client, text(action="allow"), expected=1))

    assert policies.default.label == "house@2"


async def test_what_is_in_force_is_listed(client: httpx.AsyncClient) -> None:
    data(await put(client, text("strict"), identity="strict"))
    data(await put(client, text()))
    data(await put(client, text(), expected=1))

    house, strict = data(await client.get("/v1/policies"))["data"]

    assert house.pop("time") > 1.7e9
    assert house == {
        "id": "house",
        "revision": 2,
        "author": "key-a",
        "note": "why",
        "obeyed": 2,
        "default": True,
    }
    assert (strict["id"], strict["revision"], strict["default"]) == ("strict", 1, False)


async def test_what_only_a_later_release_can_read_is_listed_too(
    client: httpx.AsyncClient, state: State, policies: StoredPolicies
) -> None:
    data(await put(client, text()))
    data(await put(client, text(), expected=1))
    key = "sg1:{policies}:revisions:house"
    async with state.connected() as redis:
        found: Any = await redis.hget(key, "2")
        await redis.hset(key, "3", json.dumps(json.loads(found) | {"version": 2}))
        await redis.hset("sg1:{policies}:heads", "house", "3")
        await redis.incr("sg1:{policies}:changes")
    await policies.refresh()

    (house,) = data(await client.get("/v1/policies"))["data"]

    assert (house["revision"], house["author"]) == (3, None)
    assert refusal(await client.get("/v1/policies/house"))[:2] == (409, "policy_unreadable")
    # The one before it holds on.
    assert house["obeyed"] == 2
    assert policies.default.label == "house@2"


async def test_texts_are_read_as_they_were_written(client: httpx.AsyncClient) -> None:
    written = "# ours\n" + text()
    data(await put(client, written))
    data(await put(client, text(action="allow"), expected=1))

    first = data(await client.get("/v1/policies/house", params={"revision": 1}))
    head = data(await client.get("/v1/policies/house"))

    assert (first["text"], first["revision"], first["author"]) == (written, 1, "key-a")
    assert (head["text"], head["revision"]) == (text(action="allow"), 2)
    revisions = data(await client.get("/v1/policies/house/revisions"))["data"]
    assert [one["revision"] for one in revisions] == [2, 1]
    assert "text" not in revisions[0]


async def test_who_did_not_see_the_revision_in_force_changes_nothing(
    client: httpx.AsyncClient,
) -> None:
    data(await put(client, text()))
    for expected in (None, 0, 2):
        stale = await put(client, text(action="allow"), expected)
        assert refusal(stale) == (409, "stale_revision", "expected_revision")
    assert data(await client.get("/v1/policies/house"))["revision"] == 1


async def test_of_many_who_publish_at_once_one_does(client: httpx.AsyncClient) -> None:
    data(await put(client, text()))
    answers = await asyncio.gather(*(put(client, text(), expected=1) for _ in range(6)))
    assert sorted(answer.status_code for answer in answers) == [200, *[409] * 5]


async def test_going_back_publishes_an_older_text(
    client: httpx.AsyncClient, policies: StoredPolicies
) -> None:
    data(await put(client, text()))
    data(await put(client, text(action="allow"), expected=1))
    back = "/v1/policies/house/rollback"

    stale = await client.post(back, json={"revision": 1, "expected_revision": 1})
    assert refusal(stale)[:2] == (409, "stale_revision")
    gone = await client.post(back, json={"revision": 7})
    assert refusal(gone)[:2] == (404, "policy_not_found")

    assert data(await client.post(back, json={"revision": 1}))["revision"] == 3
    assert policies.default.label == "house@3"
    assert data(await client.get("/v1/policies/house"))["text"] == text()


async def test_each_change_is_audited(client: httpx.AsyncClient, state: State) -> None:
    data(await put(client, text()))
    await put(client, "rules: [")
    await put(client, text(), expected=7)
    data(await client.post("/v1/policies/house/rollback", json={"revision": 1}))

    assert await acts(state) == [
        ("key-a", "publish_policy", ("house",)),
        ("key-a", "published", ("house@1",)),
        # Asked for, and refused.
        ("key-a", "publish_policy", ("house",)),
        ("key-a", "publish_policy", ("house",)),
        ("key-a", "published", ("house@2",)),
    ]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "text", "lacks text"),
        ({"text": 7}, "text", "text must be a text"),
        ({"text": CANARY}, "text", "expected a mapping"),
        ({"text": text("strict")}, "text", "send it to /v1/policies/strict"),
        ({"text": text(), "expected_revision": "1"}, "expected_revision", "a whole number or null"),
        ({"text": text(), "expected_revision": True}, "expected_revision", "a whole number"),
        ({"text": text(), "expected_revision": -1}, "expected_revision", "the number of"),
        ({"text": text(), "expected_revision": 10**20}, "expected_revision", "the number of"),
        ({"text": text(), "note": "n" * 1001}, "note", "longer than 1000"),
        ({"text": text(), CANARY: 1}, None, "it takes text, expected_revision, note"),
    ],
)
async def test_what_cannot_be_published_is_said_in_a_sentence(
    client: httpx.AsyncClient, body: dict[str, Any], param: str | None, says: str
) -> None:
    answer = await client.put("/v1/policies/house", json=body)

    assert answer.status_code == 400
    error = answer.json()["error"]
    assert says in error["message"]
    assert error["param"] == param
    assert CANARY not in answer.text
    assert data(await client.get("/v1/policies"))["data"] == []


@pytest.mark.parametrize("revision", ["0", "-1", "x", "9" * 5000, "\u00b2"])
async def test_a_revision_is_a_number(client: httpx.AsyncClient, revision: str) -> None:
    asked = await client.get("/v1/policies/house", params={"revision": revision})
    assert refusal(asked) == (400, "invalid_request", "revision")


@pytest.mark.parametrize("revision", [0, -1, 10**20, "1", None])
async def test_one_goes_back_to_a_number(client: httpx.AsyncClient, revision: object) -> None:
    data(await put(client, text()))
    asked = await client.post("/v1/policies/house/rollback", json={"revision": revision})
    assert refusal(asked) == (400, "invalid_request", "revision")


@pytest.mark.parametrize("identity", ["house", "x" * 65, "a b", "%00", "a%2Fb"])
async def test_what_is_not_there(client: httpx.AsyncClient, identity: str) -> None:
    for path in ("", "/revisions", "?revision=1"):
        assert (await client.get(f"/v1/policies/{identity}{path}")).status_code == 404


async def test_where_policies_are_files_each_route_says_so(state: State) -> None:
    routes = PolicyRoutes(PolicyStore(state), Policies(Policy()), Audit(state))
    async with client_of(routes.all()) as client:
        answers = [
            await client.get("/v1/policies"),
            await client.get("/v1/policies/default"),
            await client.get("/v1/policies/default/revisions"),
            await put(client, text("default"), identity="default"),
            await client.post("/v1/policies/default/rollback", json={"revision": 1}),
        ]
    for answer in answers:
        assert refusal(answer)[:2] == (409, "policies_are_files")
        assert "policy_source: store" in answer.json()["error"]["message"]
    assert await acts(state) == []


async def test_nothing_is_published_while_redis_is_away(
    client: httpx.AsyncClient, state: State, policies: StoredPolicies
) -> None:
    data(await put(client, text()))
    await state.close()
    assert refusal(await put(client, text(), expected=1))[:2] == (503, "state_unavailable")
    assert policies.default.label == "house@1"
