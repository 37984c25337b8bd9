"""The routes of responses that are kept: going on from one, reading it again, forgetting it."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from starlette.datastructures import QueryParams

from service.body import dumps
from service.caller import CREDENTIALS, Caller
from service.errors import BadRequest, NotFound, StateUnavailable
from service.gateway import Gateway
from service.replies import Incoming, Reply
from service.response_store import MOST_LISTED, ResponseStore, Stored, expanded, items_of, listed
from service.responses import ResponsesDialect

logger = logging.getLogger(__name__)

ONE: Final = "/v1/responses/{identity}"
INPUT_ITEMS: Final = "/v1/responses/{identity}/input_items"
_PREVIOUS: Final = "previous_response_id"


class ResponseRoutes:
    """Answers over a gateway and a store; ``hash_key`` keeps callers' credentials out of keys."""

    def __init__(
        self, gateway: Gateway, dialect: ResponsesDialect, store: ResponseStore, hash_key: bytes
    ) -> None:
        self._gateway = gateway
        self._dialect = dialect
        self._store = store
        self._hash_key = hash_key

    async def create(self, incoming: Incoming) -> Reply:
        """``POST /v1/responses``: goes on from what was kept, and keeps what was released.

        The upstream is told of the whole conversation and stores none of it. Of a prompt that was
        blocked only the refusal is kept: it would go to the upstream with each later turn.
        """
        owner = self._owner(incoming.caller, incoming.headers)
        stored = await self._previous(owner, incoming.body)
        asked: Mapping[str, Any] = incoming.body
        if stored is not None:
            asked = expanded(incoming.body, stored)
            incoming = replace(incoming, raw=dumps(asked).encode(), body=asked)
        keeps = asked.get("store") is not False

        async def keep(said: Mapping[str, Any]) -> None:
            await self._keep(owner, said, items_of(asked, said))

        if keeps:
            incoming = replace(incoming, keep=keep)
        reply = await self._gateway.handle(self._dialect, incoming)
        if reply.said is not None and keeps:
            before = stored.items if stored else ()
            items = items_of(asked, reply.said) if reply.attempts else before
            await self._keep(owner, reply.said, items)
        return reply

    async def read(
        self, caller: Caller, identity: str, query: QueryParams, headers: Mapping[str, str]
    ) -> Any:
        """``GET /v1/responses/{id}``."""
        if query.get("stream", "false").lower() not in ("false", "0"):
            raise BadRequest("a response that is kept is not streamed: leave stream out")
        return (await self._stored(self._owner(caller, headers), identity)).response

    async def delete(self, caller: Caller, identity: str, headers: Mapping[str, str]) -> Any:
        """``DELETE /v1/responses/{id}``."""
        if not await self._store.delete(self._owner(caller, headers), identity):
            raise _unknown()
        return {"id": identity, "object": "response", "deleted": True}

    async def input_items(
        self, caller: Caller, identity: str, query: QueryParams, headers: Mapping[str, str]
    ) -> Any:
        """``GET /v1/responses/{id}/input_items``."""
        limit, order = query.get("limit", "20"), query.get("order", "desc")
        if not limit.isdecimal() or not 1 <= int(limit) <= MOST_LISTED:
            raise BadRequest(f"limit must be from 1 to {MOST_LISTED}", param="limit")
        if order not in ("asc", "desc"):
            raise BadRequest("order must be asc or desc", param="order")
        stored = await self._stored(self._owner(caller, headers), identity)
        return listed(stored, limit=int(limit), after=query.get("after"), order=order)

    async def _previous(self, owner: str, body: Mapping[str, Any]) -> Stored | None:
        identity = body.get(_PREVIOUS)
        if identity is None:
            return None
        if not isinstance(identity, str):
            raise BadRequest(f"{_PREVIOUS} must be a string", param=_PREVIOUS)
        return await self._stored(owner, identity, _PREVIOUS)

    async def _stored(self, owner: str, identity: str, param: str | None = None) -> Stored:
        stored = await self._store.find(owner, identity)
        if stored is None:
            raise _unknown(param)
        return stored

    async def _keep(self, owner: str, response: Mapping[str, Any], items: Any) -> None:
        try:
            if not await self._store.keep(owner, response, items):
                logger.info("a response is too large to be kept, or has no id")
        except StateUnavailable as error:
            # It was judged and recorded: that it cannot be gone on from is no reason to lose it.
            logger.warning("a response could not be kept: %s", error)

    def _owner(self, caller: Caller, headers: Mapping[str, str]) -> str:
        """Who asks, as a keyed hash of the key or credential; all who show none are one."""
        shown = "\x00".join(headers.get(name, "") for name in CREDENTIALS[:2])
        if caller.key_id is not None:
            shown = f"key\x00{caller.key_id}"
        return hmac.digest(self._hash_key, f"owner\x00{shown}".encode(), "sha256").hex()[:32]


def _unknown(param: str | None = None) -> NotFound:
    return NotFound(
        "no such response is kept here: it may have expired, or another credential asked for it",
        code="response_not_found",
        param=param,
    )
