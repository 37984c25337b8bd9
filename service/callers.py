"""From a request's credentials to its caller: who they are, and whether they may."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Final, Literal

from service.caller import CREDENTIALS, UPSTREAM_KEY, Caller, Role
from service.errors import (
    Forbidden,
    InvalidApiKey,
    NoUpstream,
    RateLimited,
    SluicegateError,
    StateUnavailable,
)
from service.key_store import KeyStore
from service.keys import ROLES, ApiKey, holds_token, match, parse_token
from service.policies import Policies
from service.rate_limits import RateLimits

Refusal = Literal[
    "missing", "invalid", "revoked", "expired", "route", "role", "rate", "unavailable", "upstream"
]
"""Why a request was refused before it was read: the values of a metric's label."""

_LOG_SECONDS: Final = 60.0

logger = logging.getLogger(__name__)


class Callers:
    """Says who sent a request. Without ``keys`` everybody is the same.

    Where ``required`` is false a request may come without a key; one that shows a key of ours is
    held to it all the same. ``admin_required`` is the same for routes that need another role than
    ``caller``. ``upstream_keys`` are secrets by their name; ``refused`` is told of each refusal.
    """

    def __init__(
        self,
        policies: Policies,
        keys: KeyStore | None = None,
        limits: RateLimits | None = None,
        *,
        required: bool = False,
        admin_required: bool = False,
        upstream_keys: Mapping[str, str] | None = None,
        refused: Callable[[Refusal], None] = lambda reason: None,
    ) -> None:
        self._policies = policies
        self._keys = keys
        self._limits = limits
        self._required = required
        self._admin_required = admin_required
        self._upstream_keys = upstream_keys or {}
        self._refused = refused
        self._logged: dict[Refusal, tuple[float, int]] = {}

    async def identify(
        self, headers: Mapping[str, str], route: str, role: Role = "caller"
    ) -> Caller:
        """The caller of ``route``, a template, which must have ``role``; counts the request.

        ``headers`` are found by names in lower case. Raises ``InvalidApiKey``, ``Forbidden``,
        ``RateLimited``, ``StateUnavailable`` where keys cannot be checked, and ``NoUpstream`` where
        the key names an upstream key that is not set.
        """
        if self._keys is None:
            return self._anonymous(role)
        credential = _credential(headers)
        shown = parse_token(credential) if credential is not None else None
        if shown is None:
            if not (self._required if role == "caller" else self._admin_required):
                return self._anonymous(role)
            raise self._no_key(credential)
        key = self._checked(*shown)
        self._allow(key, route, role)
        left = await self._counted(key, route)
        return Caller(
            policy=self._policies.named(key.policy),
            key_id=key.id,
            roles=key.roles,
            upstream_key=self._upstream_key(key) if role == "caller" else None,
            name=key.name,
            answer_headers=left,
        )

    def _anonymous(self, role: Role) -> Caller:
        """Where admin routes ask for no key, who reaches one of them may do all."""
        roles = frozenset[Role](("caller",) if role == "caller" else ROLES)
        return Caller(self._policies.default, roles=roles)

    def _no_key(self, credential: str | None) -> SluicegateError:
        if credential is None:
            return self._refuse(
                "missing",
                InvalidApiKey(
                    "no API key was sent: send one as Authorization: Bearer, x-api-key or api-key"
                ),
            )
        return self._refuse("invalid", _unknown())

    def _checked(self, identity: str, secret: str) -> ApiKey:
        assert self._keys is not None
        try:
            key = self._keys.find(identity)
        except StateUnavailable as error:
            raise self._refuse("unavailable", error) from None
        now = self._keys.now()
        # Before anything is told of the key, and also where there is none.
        matched = match(key, secret)
        if key is None or matched == "none":
            raise self._refuse("invalid", _unknown())
        state = key.state(now)
        if state == "revoked":
            raise self._refuse("revoked", InvalidApiKey("this API key was revoked"), key)
        if state == "expired":
            raise self._refuse("expired", InvalidApiKey("this API key has expired"), key)
        if matched == "previous" and now >= (key.previous_until or 0.0):
            gone = InvalidApiKey("this API key was rotated: use the new one")
            raise self._refuse("expired", gone, key)
        return key

    def _allow(self, key: ApiKey, route: str, role: Role) -> None:
        if key.routes is not None and route not in key.routes:
            error = Forbidden("this API key may not use this route", code="route_not_allowed")
            raise self._refuse("route", error, key)
        if role not in key.roles and "admin" not in key.roles:
            error = Forbidden(
                f"this API key lacks the role {role}, which this route needs",
                code="role_not_allowed",
            )
            raise self._refuse("role", error, key)

    async def _counted(self, key: ApiKey, route: str) -> Mapping[str, str]:
        if self._limits is None or not key.limits:
            return {}
        try:
            return await self._limits.admit(key.id, route, key.limits)
        except RateLimited as error:
            raise self._refuse("rate", error, key) from None

    def _upstream_key(self, key: ApiKey) -> str | None:
        if key.upstream_key is None:
            return None
        secret = self._upstream_keys.get(key.upstream_key)
        if secret is None:
            # Another upstream key would be somebody else's.
            error = NoUpstream(
                "the upstream key of this API key is not among the setting upstream_keys",
                code="upstream_key_missing",
            )
            raise self._refuse("upstream", error, key)
        return secret

    def _refuse(
        self, reason: Refusal, error: SluicegateError, key: ApiKey | None = None
    ) -> SluicegateError:
        """Counts a refusal, and logs one a minute of each kind: clients choose how many come."""
        self._refused(reason)
        now = time.monotonic()
        last, unsaid = self._logged.get(reason, (float("-inf"), 0))
        if now - last < _LOG_SECONDS:
            self._logged[reason] = (last, unsaid + 1)
            return error
        self._logged[reason] = (now, 0)
        # An id is named only where the secret was right: else it is a client's text.
        whose = f" of the key {key.id}" if key else ""
        logger.warning("a request%s was refused (%s), and %d before it", whose, reason, unsaid)
        return error


def upstream_headers(headers: Mapping[str, str], caller: Caller) -> dict[str, str]:
    """The headers that go to the upstream for ``caller``; names are in lower case.

    Where a key of ours was shown, no credential of the request goes on; where none was, the
    client's own does. The caller's upstream key, where it has one, wins over the upstream's own.
    """
    if caller.key_id is None:
        # A header that came twice holds both: one of them may be ours.
        return {
            name: value
            for name, value in headers.items()
            if name not in CREDENTIALS or not holds_token(value)
        }
    sent = {name: value for name, value in headers.items() if name not in CREDENTIALS}
    if caller.upstream_key is not None:
        sent[UPSTREAM_KEY] = caller.upstream_key
    return sent


def _credential(headers: Mapping[str, str]) -> str | None:
    """What was sent: the first that looks like a key of ours, else the first."""
    found = []
    for name in CREDENTIALS:
        value = headers.get(name)
        if name == "authorization" and value is not None:
            scheme, _, value = value.partition(" ")
            value = value.strip() if scheme.lower() == "bearer" else ""
        if value:
            found.append(value)
    return next((one for one in found if parse_token(one)), found[0] if found else None)


def _unknown() -> InvalidApiKey:
    return InvalidApiKey("the API key is not one that is known here")
