"""What ``sluicegate keys`` does, against the state that the settings name."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, Final

from service.caller import Role
from service.command_state import opened
from service.key_store import KeyStore
from service.keys import ROLES, KeyFormatError, parse_limits, parse_seconds
from service.settings import Settings

COLUMNS: Final = ("id", "name", "state", "roles", "created", "expires", "may use")


async def create(
    settings: Settings,
    name: str,
    roles: Sequence[str],
    *,
    policy: str | None = None,
    expires: str | None = None,
    routes: Sequence[str] | None = None,
    limits: Sequence[str] = (),
    upstream_key: str | None = None,
) -> str:
    """Makes a key; returns its token. ``expires`` is a duration from now."""
    given = frozenset(map(_role, roles))
    read = parse_limits(limits)
    seconds = parse_seconds(expires) if expires is not None else None
    async with _store(settings) as store:
        _, token = await store.create(
            name,
            given,
            expires=await store.server_time() + seconds if seconds is not None else None,
            policy=policy,
            upstream_key=upstream_key,
            routes=tuple(routes) if routes else None,
            limits=read,
        )
    return token


async def listed(settings: Settings) -> list[dict[str, Any]]:
    """All keys as JSON objects."""
    async with _store(settings) as store:
        return [key.described(store.now()) for key in await store.listed()]


async def revoke(settings: Settings, identity: str) -> str:
    """Ends a key; returns its name."""
    async with _store(settings) as store:
        return (await store.revoke(identity)).name


async def rotate(settings: Settings, identity: str, keep: str) -> str:
    """Gives a key a new token, and returns it."""
    seconds = parse_seconds(keep)
    async with _store(settings) as store:
        _, token = await store.rotate(identity, seconds)
    return token


def row(key: Mapping[str, Any]) -> tuple[str, ...]:
    """A key under ``COLUMNS``."""
    grants = list(key["routes"] or [])
    for route, rates in key["limits"].items():
        grants += [rate if route == "*" else f"{route}: {rate}" for rate in rates]
    if key["policy"]:
        grants.append(f"policy {key['policy']}")
    if key["upstream_key"]:
        grants.append(f"upstream key {key['upstream_key']}")
    return (
        key["id"],
        key["name"],
        key["state"],
        " ".join(key["roles"]),
        _day(key["created"]),
        _day(key["expires"]),
        ", ".join(grants),
    )


@asynccontextmanager
async def _store(settings: Settings) -> AsyncIterator[KeyStore]:
    async with opened(settings) as state:
        yield KeyStore(state)


def _role(text: str) -> Role:
    for role in ROLES:
        if role == text:
            return role
    raise KeyFormatError(f"{text!r} is no role: give {', '.join(ROLES)}")


def _day(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")
