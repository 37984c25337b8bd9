"""The routes of reviews: what waits for somebody to look at it, claiming, deciding.

``ReviewRoutes.all`` lists them with the role that each needs; whoever mounts them checks it. Who
decides is the key that asks: where keys are off everybody is one reviewer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final, get_args

from starlette.responses import Response

from models.taxonomy import CATEGORIES, ROLES, Severity
from service.caller import Role
from service.endpoint import Call, Handler, json_response
from service.errors import BadRequest, NotFound
from service.operator_requests import body, needed, one_of, query, who, whole_number
from service.review_items import Reason, Review, ReviewFilters
from service.reviews import MOST_LISTED, Reviews

REVIEWS: Final = "/v1/reviews"
ONE: Final = "/v1/reviews/{identity}"
CLAIM: Final = "/v1/reviews/{identity}/claim"
DECISION: Final = "/v1/reviews/{identity}/decision"

CLAIMED_SECONDS: Final = 600.0
_WORDS: Final[Mapping[str, Sequence[str]]] = {
    "reason": get_args(Reason),
    "direction": ROLES,
    "category": CATEGORIES,
    "severity": tuple(level.label for level in Severity),
    "free": ("true", "false"),
}
_NAMES: Final = ("policy", "key")
_LONGEST: Final = 256


class ReviewRoutes:
    """Answers over the reviews."""

    def __init__(self, reviews: Reviews) -> None:
        self._reviews = reviews

    def all(self) -> list[tuple[str, str, Handler, Role]]:
        """Method, path, handler, role."""
        return [
            ("GET", REVIEWS, self.open, "reviewer"),
            ("GET", ONE, self.one, "reviewer"),
            ("POST", CLAIM, self.claim, "reviewer"),
            ("POST", DECISION, self.decide, "reviewer"),
        ]

    async def open(self, call: Call) -> Response:
        """``GET /v1/reviews``: a page of what nobody decided, those that wait longest first.

        ``free=true`` leaves out what others have claimed.
        """
        given = query(call, (*_WORDS, *_NAMES, "limit", "cursor"))
        one_of(given, _WORDS)
        plain = {name: given[name] for name in (*_WORDS, *_NAMES) if name in given}
        is_free = plain.pop("free", "false") == "true"
        filters = ReviewFilters(**plain, is_free_for=who(call) if is_free else None)
        limit = whole_number(given, "limit", 50, MOST_LISTED)
        page = await self._reviews.open(filters, limit, given.get("cursor"))
        waiting = await self._reviews.waiting()
        data = [shown(item) for item in page.items]
        return json_response(
            {"object": "list", "data": data, "next": page.next, "waiting": waiting}
        )

    async def one(self, call: Call) -> Response:
        """``GET /v1/reviews/{id}``, open or decided. The id is the event's."""
        query(call, ())
        return json_response(shown(await self._reviews.one(_identity(call))))

    async def claim(self, call: Call) -> Response:
        """``POST /v1/reviews/{id}/claim``: nobody else decides it for ``seconds``, ten minutes
        unless they are said; 0 gives it back.
        """
        query(call, ())
        seconds = body(call, {"seconds": (int, float)}).get("seconds", CLAIMED_SECONDS)
        item = await self._reviews.claim(_identity(call), who(call), float(seconds))
        return json_response(shown(item))

    async def decide(self, call: Call) -> Response:
        """``POST /v1/reviews/{id}/decision``: says what the text is, for good.

        The body holds ``outcome`` (``confirmed``, ``overturned``), ``severity`` and, where there
        are any, ``categories``, ``refusal`` (whether the text declines) and ``note``.
        """
        query(call, ())
        values = body(
            call,
            {
                "outcome": str,
                "severity": str,
                "categories": list,
                "refusal": (bool, type(None)),
                "note": str,
            },
        )
        categories = values.get("categories", [])
        if not all(isinstance(name, str) for name in categories):
            raise BadRequest("categories must be a list of names", param="categories")
        item = await self._reviews.resolve(
            _identity(call),
            who(call),
            needed(values, "outcome"),
            needed(values, "severity"),
            categories,
            values.get("note", ""),
            values.get("refusal"),
        )
        return json_response(shown(item))


def shown(item: Review) -> dict[str, Any]:
    """A review as JSON; who has claimed it, and for how long, as the last one to do so said."""
    claim = {"reviewer": item.reviewer, "until": item.claimed_until}
    return {
        "id": item.id,
        "reason": item.reason,
        "time": item.time,
        "request_id": item.request_id,
        "direction": item.direction,
        "level": item.level,
        "severity_score": item.severity_score,
        "categories": list(item.categories),
        "policy": item.policy,
        "guard": item.guard,
        "route": item.route,
        "outcome": item.outcome,
        "key": item.key_id,
        "claim": None if item.reviewer is None else claim,
        "decision": None if item.decision is None else asdict(item.decision),
    }


def _identity(call: Call) -> str:
    identity: str = call.request.path_params["identity"]
    if not 0 < len(identity) <= _LONGEST:
        raise NotFound("there is no such review (any more)", code="review_not_found")
    return identity
