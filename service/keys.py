"""API keys: what one grants, what its token looks like, and how it is kept; pure.

A token is ``sg-<id>-<secret>``. The id is no secret: it stands in records and logs. The secret is
256 random bits in base 62, shown once, and kept only as a SHA-256: a slow hash guards secrets that
can be guessed, and these cannot.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar, get_args

from service.caller import Role

ROLES: Final[tuple[Role, ...]] = get_args(Role)
EVERY_ROUTE: Final = "*"
"""In limits: all routes together."""
MOST_RATES: Final = 16
"""Rates of one key: each is looked at by each request."""
VERSION: Final = 1
"""Of the JSON. It grows when a key says what a reader must not pass over."""

_DIGITS: Final = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SECRET_LENGTH: Final = 43  # 62 ** 43 > 2 ** 256
_ID_LENGTH: Final = 10
_TOKEN: Final = re.compile(rf"sg-([0-9a-z]{{{_ID_LENGTH}}})-([0-9A-Za-z]{{{_SECRET_LENGTH}}})")
_ID: Final = re.compile(rf"[0-9a-z]{{{_ID_LENGTH}}}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@/-]{0,63}")
_LATEST: Final = 2.0**37
"""In the year 6325: calendars know it."""
_NOBODY: Final = "0" * 64
"""Compared with where there is no key, so that this takes as long."""

_UNITS: Final[Mapping[str, int]] = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400}
_RATE: Final = re.compile(r"([1-9]\d{0,8})/([1-9]\d{0,6})?(second|minute|hour|day|[smhd])")
_DURATION: Final = re.compile(r"(\d{1,6})([smhdw])")
_SHORT: Final[Mapping[str, int]] = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_LONGEST_WINDOW: Final = 31 * 86_400
_LONGEST_DURATION: Final = 100 * 366 * 86_400

Match = Literal["current", "previous", "none"]
T = TypeVar("T")


class KeyFormatError(ValueError):
    """A key, a rate or a duration that cannot be read; one sentence."""


@dataclass(frozen=True, slots=True)
class Rate:
    """So many requests in any time of so many seconds."""

    requests: int
    seconds: int

    @classmethod
    def parse(cls, text: str) -> Rate:
        """Reads ``60/minute``, ``1000/hour`` or ``5/30s``. Raises ``KeyFormatError``."""
        match = _RATE.fullmatch(text)
        if match is None:
            raise KeyFormatError(f"{text!r} is no limit: write 60/minute, 1000/hour or 5/30s")
        requests, times, unit = match.groups()
        seconds = int(times or 1) * (_UNITS.get(unit) or _SHORT[unit])
        if seconds > _LONGEST_WINDOW:
            raise KeyFormatError(f"the limit {text!r} counts over more than 31 days")
        return cls(int(requests), seconds)

    def __str__(self) -> str:
        for unit, seconds in _UNITS.items():
            if seconds == self.seconds:
                return f"{self.requests}/{unit}"
        return f"{self.requests}/{self.seconds}s"


Limits = Mapping[str, tuple[Rate, ...]]
"""By route template, or ``*`` for all routes together. All that speak of a route hold for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key as it is kept. Times are seconds since 1970."""

    id: str
    name: str
    roles: frozenset[Role]
    created: float
    digest: str = field(repr=False)
    """SHA-256 of the secret, in hexadecimal."""
    expires: float | None = None
    revoked: float | None = None
    policy: str | None = None
    """A policy's id; None is the policy of everybody."""
    upstream_key: str | None = None
    """A name in the setting ``upstream_keys``: no upstream's secret is kept here."""
    routes: tuple[str, ...] | None = None
    """Route templates that it may use; None is all of them."""
    limits: Limits = field(default_factory=dict)
    previous: str | None = field(default=None, repr=False)
    """The digest before the last rotation."""
    previous_until: float | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise KeyFormatError(
                "a key's name has 1 to 64 letters, digits, spaces or ._@/- and begins with a"
                " letter or digit"
            )
        if not self.roles:
            raise KeyFormatError(f"a key needs a role: {', '.join(ROLES)}")
        for route in (*(self.routes or ()), *(self.limits.keys() - {EVERY_ROUTE})):
            if not route.startswith("/"):
                raise KeyFormatError(f"{route!r} is no route: write it as /v1/chat/completions")
        if sum(map(len, self.limits.values())) > MOST_RATES:
            raise KeyFormatError(f"a key has at most {MOST_RATES} limits")
        for route, rates in self.limits.items():
            # They would be one window, and a request count in it twice.
            if len({rate.seconds for rate in rates}) < len(rates):
                where = "all routes" if route == EVERY_ROUTE else route
                raise KeyFormatError(f"two limits for {where} count over the same time: give one")

    def state(self, now: float) -> Literal["live", "revoked", "expired"]:
        """Whether it may be used at ``now``."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and now >= self.expires else "live"

    def described(self, now: float) -> dict[str, Any]:
        """All but its digests, as JSON, for operators."""
        return {
            "id": self.id,
            "name": self.name,
            "state": self.state(now),
            "roles": [role for role in ROLES if role in self.roles],
            "created": self.created,
            "expires": self.expires,
            "revoked": self.revoked,
            "policy": self.policy,
            "upstream_key": self.upstream_key,
            "routes": None if self.routes is None else list(self.routes),
            "limits": {route: [*map(str, rates)] for route, rates in self.limits.items()},
        }

    def to_json(self) -> str:
        """As it is kept in Redis."""
        shown = self.described(self.created)
        del shown["state"]
        shown |= {
            "version": VERSION,
            "digest": self.digest,
            "previous": self.previous,
            "previous_until": self.previous_until,
        }
        return json.dumps(shown, separators=(",", ":"))

    @classmethod
    def from_json(cls, data: bytes | str) -> ApiKey:
        """Reads what ``to_json`` wrote, here or in a later release: keys and roles that are not
        known are passed over. Raises ``KeyFormatError``, also where the version is a later one,
        which may hold a restriction that would be missed.
        """
        try:
            value = json.loads(data)
            if value["version"] > VERSION:
                raise KeyFormatError("the key was written by a later release")
            routes = value.get("routes")
            roles = [*_listed(value["roles"])]
            return cls(
                id=_matching(_ID, value["id"]),
                name=value["name"],
                roles=frozenset(role for role in ROLES if role in roles),
                created=_time(value["created"]),
                digest=_matching(_DIGEST, value["digest"]),
                expires=_if_given(_time, value.get("expires")),
                revoked=_if_given(_time, value.get("revoked")),
                policy=_if_given(_text, value.get("policy")),
                upstream_key=_if_given(_text, value.get("upstream_key")),
                routes=None if routes is None else tuple(map(_text, _listed(routes))),
                limits={
                    route: tuple(map(Rate.parse, _listed(rates)))
                    for route, rates in (value.get("limits") or {}).items()
                },
                previous=_if_given(lambda one: _matching(_DIGEST, one), value.get("previous")),
                previous_until=_if_given(_time, value.get("previous_until")),
            )
        except KeyFormatError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise KeyFormatError("the key cannot be read") from error


def new_id() -> str:
    """About 52 random bits; the store sees that it is not taken."""
    return "".join(secrets.choice(_DIGITS[:36]) for _ in range(_ID_LENGTH))


def new_secret() -> str:
    """256 random bits in base 62."""
    number = secrets.randbits(256)
    digits = []
    for _ in range(_SECRET_LENGTH):
        number, digit = divmod(number, 62)
        digits.append(_DIGITS[digit])
    return "".join(digits)


def token(identity: str, secret: str) -> str:
    """What a client sends."""
    return f"sg-{identity}-{secret}"


def parse_token(text: str) -> tuple[str, str] | None:
    """The id and the secret of a token; None where it is not one of ours."""
    match = _TOKEN.fullmatch(text)
    return (match[1], match[2]) if match else None


def holds_token(text: str) -> bool:
    """Whether a token of ours is anywhere in it."""
    return _TOKEN.search(text) is not None


def hashed(secret: str) -> str:
    """A secret as it is kept."""
    return hashlib.sha256(secret.encode()).hexdigest()


def match(key: ApiKey | None, secret: str) -> Match:
    """Which secret of ``key`` this is. Takes as long where there is no key."""
    shown = hashed(secret)
    is_current = hmac.compare_digest(shown, key.digest if key else _NOBODY)
    is_previous = hmac.compare_digest(shown, (key.previous if key else None) or _NOBODY)
    return "current" if is_current else "previous" if is_previous else "none"


def parse_seconds(text: str) -> int:
    """Reads a duration such as ``12h``, ``30d`` or ``4w``. Raises ``KeyFormatError``."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise KeyFormatError(f"{text!r} is no duration: write 30m, 12h, 30d or 4w")
    seconds = int(match[1]) * _SHORT[match[2]]
    if seconds > _LONGEST_DURATION:
        raise KeyFormatError(f"{text!r} is longer than 100 years")
    return seconds


def parse_limits(texts: Sequence[str]) -> Limits:
    """Reads ``60/minute`` (all routes together) and ``/v1/moderations=5/second``."""
    limits: dict[str, tuple[Rate, ...]] = {}
    for text in texts:
        route, is_given, rate = text.rpartition("=")
        route = route if is_given else EVERY_ROUTE
        limits[route] = (*limits.get(route, ()), Rate.parse(rate))
    return limits


# What Redis holds may be anything: one key that is not what it should be must not fail the others.


def _if_given(read: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else read(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a string")
    return value


def _matching(pattern: re.Pattern[str], value: Any) -> str:
    if not pattern.fullmatch(_text(value)):
        raise ValueError("not of its form")
    return _text(value)


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("not a list")
    return value


def _time(value: Any) -> float:
    # Not a number (NaN) is in no range.
    if not 0 <= value <= _LATEST:
        raise ValueError("not a time")
    return float(value)
