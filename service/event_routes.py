"""The routes of records, for operators: finding, counting, exporting, kept texts, deletion, audit.

``EventRoutes.all`` lists them with the role that each needs; whoever mounts them checks it.
"""

from __future__ import annotations

import math
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

from starlette.datastructures import QueryParams
from starlette.responses import Response

from models.taxonomy import CATEGORIES, ROLES, Severity
from service import audit, events
from service.audit import Audit
from service.caller import Role
from service.endpoint import Call, Handler, json_response, replied
from service.errors import BadRequest, NotFound
from service.events import Event, Events, Filters, shown
from service.kept_texts import KeptTexts, hashed_subject
from service.operator_requests import one_of, query, whole_number
from service.replies import Reply

EVENTS: Final = "/v1/events"
EXPORT: Final = "/v1/events.jsonl"
HOURS: Final = "/v1/events/hours"
ONE: Final = "/v1/events/{identity}"
TEXT: Final = "/v1/events/{identity}/text"
SUBJECT: Final = "/v1/events/subjects/{subject:path}"
AUDIT: Final = "/v1/audit"

OUTCOMES: Final = (
    "allowed",
    "annotated",
    "steered",
    "regenerated",
    "redacted",
    "blocked",
    "would_block",
    "bypassed",
    "error",
)
_WORDS: Final[Mapping[str, Sequence[str]]] = {
    "direction": ROLES,
    "category": CATEGORIES,
    "severity": tuple(level.label for level in Severity),
    "outcome": OUTCOMES,
}
_NAMES: Final = ("route", "key", "policy", "model", "request_id")
_TIMES: Final = ("since", "until")
_FILTERS: Final = (*_WORDS, *_NAMES, *_TIMES)
_LISTED: Final = 50
_IDENTITY: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""What may be an id; the audit lists them between blanks."""
_DAY: Final = 86_400.0


class EventRoutes:
    """Answers over records, texts and the audit. ``hash_key`` is what subjects are hashed with."""

    def __init__(self, events: Events, texts: KeptTexts, audit: Audit, hash_key: bytes) -> None:
        self._events = events
        self._texts = texts
        self._audit = audit
        self._hash_key = hash_key

    def all(self) -> list[tuple[str, str, Handler, Role]]:
        """Method, path, handler, role; in the order in which to mount them."""
        return [
            ("GET", EVENTS, self.find, "viewer"),
            ("GET", EXPORT, self.export, "viewer"),
            ("GET", HOURS, self.hours, "viewer"),
            ("DELETE", SUBJECT, self.delete_subject, "admin"),
            ("GET", ONE, self.one, "viewer"),
            ("GET", TEXT, self.text, "viewer"),
            ("GET", AUDIT, self.acts, "admin"),
        ]

    async def find(self, call: Call) -> Response:
        """``GET /v1/events``: a page, newest first, and the cursor of the next."""
        given = query(call, (*_FILTERS, "limit", "cursor"))
        limit = whole_number(given, "limit", _LISTED, events.MOST_LISTED)
        page = await self._events.find(_filters(given), limit, given.get("cursor"))
        data = [shown(event) for event in page.events]
        return json_response({"object": "list", "data": data, "next": page.next})

    async def export(self, call: Call) -> Response:
        """``GET /v1/events.jsonl``: everything that matches, a record a line."""
        lines = self._events.export(_filters(query(call, _FILTERS)))
        # The first page is asked for here, so that what fails still has a status.
        first = await anext(lines)
        headers = (("content-type", "application/jsonl"),)
        return replied(Reply(200, headers, b"", stream=_with(first, lines)))

    async def hours(self, call: Call) -> Response:
        """``GET /v1/events/hours``: counts, of the last day unless it is said."""
        given = query(call, _TIMES)
        until = _time(given, "until")
        until = await self._events.now() if until is None else until
        since = _time(given, "since")
        counts = await self._events.hours(until - _DAY if since is None else since, until)
        data = [
            {
                "hour": count.hour,
                "direction": count.direction,
                "outcome": count.outcome,
                "category": count.category,
                "severity": count.severity,
                "weight": count.weight,
            }
            for count in counts
        ]
        return json_response({"object": "list", "data": data})

    async def one(self, call: Call) -> Response:
        """``GET /v1/events/{id}``."""
        query(call, ())
        return json_response(shown(await self._event(call)))

    async def text(self, call: Call) -> Response:
        """``GET /v1/events/{id}/text``: what was kept of it. The look is recorded."""
        query(call, ())
        identity = _identity(call)
        kept = await self._texts.look(identity, call.caller.key_id)
        if kept is None:
            raise NotFound(
                "no text is kept of this event: its policy says record.text: none, or its time"
                " is over",
                code="unknown_text",
            )
        return json_response(
            {"id": identity, "text": kept.text, "kept": kept.kept, "cut": kept.is_cut}
        )

    async def delete_subject(self, call: Call) -> Response:
        """``DELETE /v1/events/subjects/{subject}``: the subject as the client named it."""
        query(call, ())
        subject = hashed_subject(call.request.path_params["subject"], self._hash_key)
        deleted = await self._texts.delete_subject(subject, call.caller.key_id)
        return json_response({"object": "subject.deleted", "deleted": len(deleted)})

    async def acts(self, call: Call) -> Response:
        """``GET /v1/audit``: a page, newest first."""
        given = query(call, ("limit", "cursor"))
        limit = whole_number(given, "limit", _LISTED, audit.MOST_LISTED)
        acts, following = await self._audit.list(limit, given.get("cursor"))
        data = [
            {
                "id": act.id,
                "time": act.time,
                "key": act.key_id,
                "action": act.action,
                "events": list(act.record_ids),
            }
            for act in acts
        ]
        return json_response({"object": "list", "data": data, "next": following})

    async def _event(self, call: Call) -> Event:
        event = await self._events.one(_identity(call))
        if event is None:
            raise NotFound("there is no event of this id, or no longer", code="unknown_event")
        return event


def _identity(call: Call) -> str:
    identity: str = call.request.path_params["identity"]
    if not _IDENTITY.fullmatch(identity):
        raise NotFound("there is no event of this id, or no longer", code="unknown_event")
    return identity


async def _with(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    try:
        yield first
        async for lines in rest:
            yield lines
    finally:
        await rest.aclose()


def _filters(given: QueryParams) -> Filters:
    one_of(given, _WORDS)
    plain = {name: given[name] for name in (*_WORDS, *_NAMES) if name in given}
    return Filters(**plain, since=_time(given, "since"), until=_time(given, "until"))


def _time(given: QueryParams, name: str) -> float | None:
    """Seconds since 1970, from them or from ISO 8601; without an offset that is UTC."""
    if name not in given:
        return None
    text = given[name]
    try:
        seconds = float(text)
    except ValueError:
        try:
            # A plus sign in a query is a space.
            moment = datetime.fromisoformat(text.replace(" ", "+") if "T" in text else text)
            if moment.tzinfo is None:
                moment = moment.replace(tzinfo=UTC)
            seconds = moment.timestamp()
        except (ValueError, OverflowError):
            seconds = math.nan
    if not 0 <= seconds < 2**38:
        raise BadRequest(
            f"{name} must be a time: seconds since 1970, or such as 2026-01-31T12:00:00Z",
            param=name,
        )
    return seconds
