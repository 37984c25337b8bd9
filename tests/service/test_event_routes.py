"""The routes of records, asked as a client asks: pages, errors in a sentence, looks recorded."""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.responses import Response

from service.caller import Caller
from service.endpoint import Call, Handler, json_response
from service.errors import SluicegateError
from service.event_routes import EventRoutes
from service.kept_texts import hashed_subject
from service.policy import Policy
from tests.service.event_rig import RECORD, Kept, ids_of, kept, scores, some_records

KEY = b"k" * 32


@pytest.fixture
async def rig(url: str, tmp_path: Path) -> AsyncIterator[Kept]:
    async with kept(url, tmp_path) as made:
        yield made


@pytest.fixture
async def client(rig: Kept) -> AsyncIterator[httpx.AsyncClient]:
    """Asks an application that has these routes alone, as the key ``key-a``."""
    app = FastAPI()
    for method, path, handler, _ in EventRoutes(rig.events, rig.texts, rig.audit, KEY).all():
        app.api_route(path, methods=[method], response_class=Response)(endpoint(handler))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://sluicegate") as made:
        yield made


def endpoint(handler: Handler) -> Any:
    async def answer(request: Request) -> Response:
        try:
            return await handler(Call(request, "id", b"", Caller(Policy(), "key-a")))
        except SluicegateError as error:
            return json_response(error.body(), error.status)

    return answer


async def asked(client: httpx.AsyncClient, path: str, **query: Any) -> Any:
    answer = await client.get(path, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_only_an_admin_deletes_and_reads_the_audit(rig: Kept) -> None:
    roles = {
        (method, path): role
        for method, path, _, role in EventRoutes(rig.events, rig.texts, rig.audit, KEY).all()
    }

    assert {role for role in roles.values()} == {"viewer", "admin"}
    assert roles["DELETE", "/v1/events/subjects/{subject:path}"] == "admin"
    assert roles["GET", "/v1/audit"] == "admin"


async def test_events_come_in_pages(rig: Kept, client: httpx.AsyncClient) -> None:
    records = some_records(25)
    await rig.write(*records)

    found, query = [], {"limit": 10}
    while True:
        page = await asked(client, "/v1/events", **query)
        found += [event["id"] for event in page["data"]]
        if page["next"] is None:
            break
        query["cursor"] = page["next"]

    assert found == ids_of(records)


async def test_an_event_shows_scores_by_name_and_no_subject(
    rig: Kept, client: httpx.AsyncClient
) -> None:
    violent = replace(
        RECORD, level="severe", category_scores=scores("violence"), subject="a-subject"
    )
    await rig.write(violent)

    event = await asked(client, f"/v1/events/{RECORD.id}")

    assert event["categories"] == ["violence"]
    assert event["category_scores"]["violence"] == 0.9
    assert set(event["signal_scores"]) == {"refusal", "injection", "self_harm", "minors"}
    assert "a-subject" not in json.dumps(event)
    assert (await asked(client, "/v1/events", category="violence"))["data"] == [event]
    assert (await asked(client, "/v1/events", category="drugs"))["data"] == []


async def test_times_are_seconds_or_iso(rig: Kept, client: httpx.AsyncClient) -> None:
    await rig.write(RECORD)

    for since, count in [
        ("1000", 1),
        ("2020-01-01T00:00:00Z", 1),
        ("2020-01-01", 1),
        ("2020-01-01T00:00:00+02:00", 1),
        ("2100-01-01T00:00:00Z", 0),
    ]:
        assert len((await asked(client, "/v1/events", since=since))["data"]) == count


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("direction=up", "direction must be one of prompt, response"),
        ("category=evil", "category must be one of endangering_national_security"),
        ("severity=bad", "severity must be one of none, minor, moderate, severe"),
        ("outcome=gone", "outcome must be one of allowed"),
        ("since=yesterday", "since must be a time"),
        ("until=nan", "until must be a time"),
        ("until=1e300", "until must be a time"),
        ("limit=0", "limit must be a whole number from 1 to 500"),
        ("limit=501", "limit must be a whole number from 1 to 500"),
        ("limit=x", "limit must be a whole number from 1 to 500"),
        ("cursor=x", "cursor is none of ours"),
        ("model=", "model must have 1 to 256 characters"),
        ("model=" + "x" * 257, "model must have 1 to 256 characters"),
        ("model=a&model=b", "model is given twice"),
        ("colour=vermilion", "it takes direction, category, severity, outcome, route, key"),
    ],
)
async def test_a_bad_filter_is_named(client: httpx.AsyncClient, query: str, says: str) -> None:
    answer = await client.get(f"/v1/events?{query}")

    assert answer.status_code == 400
    error = answer.json()["error"]
    assert says in error["message"]
    assert "vermilion" not in error["message"]
    assert error["param"] == (None if "colour" in query else query.partition("=")[0])


async def test_what_is_not_there_is_404(client: httpx.AsyncClient) -> None:
    for path in ("/v1/events/unknown", "/v1/events/unknown/text", f"/v1/events/{'x' * 300}"):
        assert (await client.get(path)).status_code == 404


async def test_nobody_makes_an_act_look_like_one_on_other_events(
    rig: Kept, client: httpx.AsyncClient
) -> None:
    for identity in ("one%20two", "one%0Atwo", "x" * 129):
        assert (await client.get(f"/v1/events/{identity}/text")).status_code == 404

    assert (await asked(client, "/v1/audit"))["data"] == []


async def test_a_text_is_shown_and_the_look_recorded(rig: Kept, client: httpx.AsyncClient) -> None:
    await rig.texts.keep(RECORD.id, "mail ann@example.org", "redacted")

    assert await asked(client, f"/v1/events/{RECORD.id}/text") == {
        "id": RECORD.id,
        "text": "mail [email]",
        "kept": "redacted",
        "cut": False,
    }
    (act,) = (await asked(client, "/v1/audit"))["data"]
    assert (act["key"], act["action"], act["events"]) == ("key-a", "read_text", [RECORD.id])


async def test_an_export_is_json_lines(rig: Kept, client: httpx.AsyncClient) -> None:
    records = some_records(30)
    await rig.write(*records)

    answer = await client.get("/v1/events.jsonl", params={"outcome": "blocked"})

    assert answer.headers["content-type"] == "application/jsonl"
    found = [json.loads(line)["id"] for line in answer.text.splitlines()]
    assert found == ids_of([record for record in records if record.outcome == "blocked"])
    assert (await client.get("/v1/events.jsonl?limit=5")).status_code == 400


async def test_hours_of_the_last_day(rig: Kept, client: httpx.AsyncClient) -> None:
    await rig.write(RECORD, replace(RECORD, id="2", weight=3.0))

    counts = (await asked(client, "/v1/events/hours"))["data"]

    assert sum(count["weight"] for count in counts) == 4.0
    assert {(one["direction"], one["outcome"], one["category"]) for one in counts} == {
        ("prompt", "allowed", None)
    }
    assert (await client.get("/v1/events/hours?since=0")).status_code == 400


async def test_the_last_day_is_that_of_the_server(
    rig: Kept, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await rig.write(RECORD)
    monkeypatch.setattr(time, "time", lambda: 1_000_000_000.0)

    assert len((await asked(client, "/v1/events/hours"))["data"]) == 1


async def test_a_subject_is_deleted_by_its_plain_name(rig: Kept, client: httpx.AsyncClient) -> None:
    subject = "ann/of the lake"
    await rig.write(replace(RECORD, subject=hashed_subject(subject, KEY)), replace(RECORD, id="2"))

    answer = await client.delete("/v1/events/subjects/ann%2Fof%20the%20lake")

    assert answer.json() == {"object": "subject.deleted", "deleted": 1}
    assert await rig.ids() == ["2"]
    audited = await asked(client, "/v1/audit", limit=1)
    assert audited["data"][0]["events"] == [RECORD.id]
    assert "ann" not in json.dumps(audited)
