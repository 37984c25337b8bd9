"""The routes of published policies: what is in force, what was, publishing, going back.

``PolicyRoutes.all`` lists them with the role that each needs; whoever mounts them checks it. They
are of use where ``policy_source`` is ``store``, and say so where it is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Mapping
from operator import attrgetter
from typing import Any, Final

from starlette.responses import Response

from service.audit import Audit
from service.caller import Role
from service.endpoint import Call, Handler, json_response
from service.errors import BadRequest, Conflict, NotFound, StateUnavailable
from service.operator_requests import body, needed, query, who, whole_number
from service.policies import Policies
from service.policy_store import (
    MOST_REVISION,
    Head,
    PolicyStore,
    Revision,
    RevisionFormatError,
    check_policy,
)
from service.stored_policies import StoredPolicies

POLICIES: Final = "/v1/policies"
ONE: Final = "/v1/policies/{identity}"
REVISIONS: Final = "/v1/policies/{identity}/revisions"
ROLLBACK: Final = "/v1/policies/{identity}/rollback"

_IDENTITY: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NUMBER: Final = (int, type(None))
_REFRESH_SECONDS: Final = 5.0

logger = logging.getLogger(__name__)


class PolicyRoutes:
    """Answers over the store, and brings what was published into force here at once."""

    def __init__(self, store: PolicyStore, policies: Policies, audit: Audit) -> None:
        self._store = store
        self._policies = policies
        self._audit = audit

    def all(self) -> list[tuple[str, str, Handler, Role]]:
        """Method, path, handler, role."""
        return [
            ("GET", POLICIES, self.list, "viewer"),
            ("GET", ONE, self.one, "viewer"),
            ("GET", REVISIONS, self.revisions, "viewer"),
            ("PUT", ONE, self.publish, "publisher"),
            ("POST", ROLLBACK, self.roll_back, "publisher"),
        ]

    async def list(self, call: Call) -> Response:
        """``GET /v1/policies``: what is in force, by id; also what cannot be read here."""
        policies = self._published()
        query(call, ())
        stored = await self._store.stored()
        data = [
            {
                **_described(head.id, head.revision, _readable(head)),
                "obeyed": policies.revision_of(head.id),
                "default": head.id == policies.default_id,
            }
            for head in sorted(stored.heads, key=attrgetter("id"))
        ]
        return json_response({"object": "list", "data": data})

    async def one(self, call: Call) -> Response:
        """``GET /v1/policies/{id}``: the text in force, or of ``?revision=N``."""
        self._published()
        given = query(call, ("revision",))
        number = whole_number(given, "revision", 0, MOST_REVISION)
        revision = await self._store.read(_identity(call), number or None)
        return json_response(_shown(revision))

    async def revisions(self, call: Call) -> Response:
        """``GET /v1/policies/{id}/revisions``: those that are kept, newest first."""
        self._published()
        query(call, ())
        found = await self._store.history(_identity(call))
        if not found:
            raise NotFound("there is no such policy", code="policy_not_found")
        data = [_described(one.id, one.revision, one) for one in found]
        return json_response({"object": "list", "data": data})

    async def publish(self, call: Call) -> Response:
        """``PUT /v1/policies/{id}``: puts a text into force.

        The body holds ``text``, ``expected_revision`` (the one that it replaces; null or left out
        where the id is new) and, if there is something to say, ``note``.
        """
        self._published()
        query(call, ())
        identity = _identity(call)
        values = body(call, {"text": str, "expected_revision": _NUMBER, "note": str})
        text = needed(values, "text")
        expected = _expected(values)
        policy = await check_policy(text)
        if policy.id != identity:
            raise BadRequest(
                f"the text has the id {policy.id}, and the route another: send it to"
                f" {POLICIES}/{policy.id}",
                param="text",
            )
        await self._audit.add(call.caller.key_id, "publish_policy", [identity])
        note = values.get("note", "")
        number = await self._store.publish(text, who(call), note, expected)
        return await self._in_force(call, identity, number)

    async def roll_back(self, call: Call) -> Response:
        """``POST /v1/policies/{id}/rollback``: publishes the text of ``revision`` again.

        Where ``expected_revision`` is left out it replaces whichever is in force.
        """
        self._published()
        query(call, ())
        identity = _identity(call)
        values = body(call, {"revision": int, "expected_revision": _NUMBER})
        revision = needed(values, "revision")
        if not 1 <= revision <= MOST_REVISION:
            raise BadRequest("revision must be 1 or more", param="revision")
        expected = _expected(values)
        await self._audit.add(call.caller.key_id, "publish_policy", [identity])
        number = await self._store.rollback(identity, revision, who(call), expected)
        return await self._in_force(call, identity, number)

    async def _in_force(self, call: Call, identity: str, number: int) -> Response:
        """The answer to who published. What fails from here on undoes nothing."""
        label = f"{identity}@{number}"
        try:
            await self._audit.add(call.caller.key_id, "published", [label])
        except StateUnavailable:
            logger.error("the policy %s was published, and the audit does not say so", label)
        # Else it is in force here within a second, as everywhere.
        with contextlib.suppress(StateUnavailable, TimeoutError):
            async with asyncio.timeout(_REFRESH_SECONDS):
                await self._published().refresh()
        return json_response({"object": "policy.published", "id": identity, "revision": number})

    def _published(self) -> StoredPolicies:
        if isinstance(self._policies, StoredPolicies):
            return self._policies
        raise Conflict(
            "policies come from files here: change those, or set policy_source: store to publish"
            " them",
            code="policies_are_files",
        )


def _identity(call: Call) -> str:
    identity: str = call.request.path_params["identity"]
    if not _IDENTITY.fullmatch(identity):
        raise NotFound("there is no such policy", code="policy_not_found")
    return identity


def _expected(values: Mapping[str, Any]) -> int | None:
    expected: int | None = values.get("expected_revision")
    if expected is not None and not 0 <= expected <= MOST_REVISION:
        raise BadRequest(
            "expected_revision must be the number of the revision in force, or null",
            param="expected_revision",
        )
    return expected


def _readable(head: Head) -> Revision | None:
    try:
        return Revision.from_json(head.data)
    except RevisionFormatError:
        return None


def _described(identity: str, number: int, revision: Revision | None) -> dict[str, Any]:
    """A revision without its text; None stands for one that a later release wrote."""
    said = {name: getattr(revision, name, None) for name in ("author", "note", "time")}
    return {"id": identity, "revision": number, **said}


def _shown(revision: Revision) -> dict[str, Any]:
    return {**_described(revision.id, revision.revision, revision), "text": revision.text}
