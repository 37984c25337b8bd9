"""Policies that are published while the service runs, with their revisions, in Redis.

``sg1:{policies}:heads`` is a hash of id → number of the revision in force, and
``sg1:{policies}:revisions:<id>`` one of number → JSON, of which the newest so many are kept.
``sg1:{policies}:changes`` is a counter that each change raises. A revision never changes: going
back to an older one publishes its text again.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import yaml

from service.errors import (
    BadRequest,
    ConfigurationError,
    Conflict,
    NotFound,
    StoreFull,
    TooLarge,
)
from service.policy import Policy, parse_policy
from service.state import State

HEADS: Final = "sg1:{policies}:heads"
CHANGES: Final = "sg1:{policies}:changes"
_REVISIONS: Final = "sg1:{policies}:revisions:"
VERSION: Final = 1
MOST_POLICIES: Final = 100
MOST_BYTES: Final = 64 * 1024
"""Of one policy's text."""
_DEEPEST: Final = 16
_LONGEST_AUTHOR: Final = 128
_LONGEST_NOTE: Final = 1000
_LONGEST_FAULT: Final = 500
MOST_REVISION: Final = 2**53
"""Up to here every number is exact in Lua and in JSON."""
_LOOKED_BACK: Final = 10
"""Revisions that are tried before one that cannot be read here."""

# KEYS: heads, changes, revisions. ARGV: id, revision that must be in force (0: none), JSON, most
# revisions, most policies. 1 where it was published, -1 where there is no room; else the revision
# in force, negative and less 1. It trims first, because deleting is allowed in a server that is
# full and adding is not.
_PUBLISH: Final = """
local head = tonumber(redis.call('HGET', KEYS[1], ARGV[1]) or '0')
local expected = tonumber(ARGV[2])
if head ~= expected then return -2 - head end
if head == 0 and redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[5]) then return -1 end
local most = tonumber(ARGV[4])
if redis.call('HLEN', KEYS[3]) >= most then
  for _, number in ipairs(redis.call('HKEYS', KEYS[3])) do
    if tonumber(number) <= head + 1 - most then redis.call('HDEL', KEYS[3], number) end
  end
end
redis.call('HSET', KEYS[3], string.format('%.0f', head + 1), ARGV[3])
redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f', head + 1))
redis.call('INCR', KEYS[2])
return 1
"""
# KEYS: heads, changes, revisions of each. ARGV: id and JSON of each. Only into an empty store.
_SEED: Final = """
if redis.call('HLEN', KEYS[1]) > 0 then return 0 end
for i = 3, #KEYS do
  redis.call('HSET', KEYS[i], '1', ARGV[2 * i - 4])
  redis.call('HSET', KEYS[1], ARGV[2 * i - 5], '1')
end
redis.call('INCR', KEYS[2])
return 1
"""
# KEYS: heads, changes. ARGV: beginning of the keys of revisions. All as it stands at one moment:
# the counter, then id, number and JSON by turns.
_READ: Final = """
local found = {redis.call('GET', KEYS[2]) or '0'}
local heads = redis.call('HGETALL', KEYS[1])
for i = 1, #heads, 2 do
  found[#found + 1], found[#found + 2] = heads[i], heads[i + 1]
  found[#found + 1] = redis.call('HGET', ARGV[1] .. heads[i], heads[i + 1]) or ''
end
return found
"""


class RevisionFormatError(ValueError):
    """A stored policy that cannot be read or obeyed here: a later release may have written it."""


@dataclass(frozen=True, slots=True)
class Revision:
    """One edition of a policy. ``text`` is YAML as it was published; ``time`` in seconds since
    1970, by the clock of who published it.
    """

    id: str
    revision: int
    text: str
    author: str
    note: str
    time: float

    def to_json(self) -> str:
        """What ``from_json`` reads."""
        return json.dumps({"version": VERSION, **asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, data: bytes | str) -> Revision:
        """Keys that are not known are passed over. Raises ``RevisionFormatError``."""
        try:
            return cls.from_values(json.loads(data))
        except ValueError as error:
            raise RevisionFormatError(str(error)) from None

    @classmethod
    def from_values(cls, values: Any) -> Revision:
        """The same of JSON that was decoded."""
        try:
            if values["version"] > VERSION:
                raise RevisionFormatError("it was written by a later release")
            return cls(
                id=str(values["id"]),
                revision=int(values["revision"]),
                text=str(values["text"]),
                author=values.get("author", ""),
                note=values.get("note", ""),
                time=values.get("time", 0.0),
            )
        except RevisionFormatError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RevisionFormatError("it is not what a policy is stored as") from error

    def policy(self) -> Policy:
        """Its policy, numbered. Raises ``RevisionFormatError``."""
        try:
            policy = parse_policy(self.text)
        except ConfigurationError as error:
            raise RevisionFormatError(str(error)) from error
        if policy.id != self.id:
            raise RevisionFormatError("its text has another id")
        return policy.model_copy(update={"revision": self.revision})


@dataclass(frozen=True, slots=True)
class Head:
    """What is in force under an id, as JSON."""

    id: str
    revision: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Stored:
    """All that is in force at one moment, and the counter of changes then."""

    changes: bytes
    heads: tuple[Head, ...]


class PolicyStore:
    """Publishes and reads. Raises ``StateUnavailable`` while Redis is away."""

    def __init__(
        self, state: State, *, most_revisions: int = 50, most_policies: int = MOST_POLICIES
    ) -> None:
        self._state = state
        self._most_revisions = most_revisions
        self._most_policies = most_policies
        self._publish = state.script(_PUBLISH)
        self._seed = state.script(_SEED)
        self._read = state.script(_READ)

    async def publish(
        self, text: str, author: str, note: str = "", expected_revision: int | None = None
    ) -> int:
        """Puts a policy into force under the id that its text has; returns its number.

        ``expected_revision`` is the one that the author saw in force; None or 0 where the id is
        new. A ``revision`` in the text is passed over. Raises ``BadRequest`` where the text is no
        policy, ``TooLarge``, ``StoreFull``, and ``Conflict`` where another one is in force.
        """
        policy = await check_policy(text)
        _check_words(author, note)
        expected = expected_revision or 0
        made = Revision(policy.id, expected + 1, text, author, note, time.time())
        keys = [HEADS, CHANGES, f"{_REVISIONS}{policy.id}"]
        arguments: list[str | int] = [
            policy.id,
            expected,
            made.to_json(),
            self._most_revisions,
            self._most_policies,
        ]
        async with self._state.connected() as redis:
            answer = int(await self._publish(keys, arguments, client=redis))
        if answer == -1:
            raise StoreFull(f"{self._most_policies} policies are stored already")
        if answer < 0:
            head = -2 - answer
            seen = f"revision {expected}" if expected else "none"
            raise Conflict(
                f"revision {head} of the policy {policy.id} is in force, and {seen} was expected:"
                " read it and publish again"
                if head
                else f"there is no policy {policy.id}, and {seen} was expected",
                code="stale_revision",
                param="expected_revision",
            )
        return made.revision

    async def rollback(
        self, identity: str, revision: int, author: str, expected_revision: int | None = None
    ) -> int:
        """Publishes the text of an older revision as a new one; returns its number.

        Without ``expected_revision`` it is the one in force now. Raises as ``publish`` and
        ``read`` do.
        """
        older = await self.read(identity, revision)
        if expected_revision is None:
            expected_revision = await self._head(identity)
        note = f"back to revision {revision}"
        return await self.publish(older.text, author, note, expected_revision)

    async def read(self, identity: str, revision: int | None = None) -> Revision:
        """A revision; the one in force where none is named.

        Raises ``NotFound`` where it is not kept, and ``Conflict`` where it cannot be read here.
        """
        number = await self._head(identity) if revision is None else revision
        async with self._state.connected() as redis:
            data = await redis.hget(f"{_REVISIONS}{identity}", str(number))
        if data is None:
            raise NotFound(f"there is no revision {number} of it", code="policy_not_found")
        try:
            return Revision.from_json(data)
        except RevisionFormatError as error:
            raise Conflict(
                f"revision {number} cannot be read here: {error}", code="policy_unreadable"
            ) from error

    async def history(self, identity: str) -> list[Revision]:
        """Revisions that are kept and can be read here, newest first."""
        async with self._state.connected() as redis:
            found: Any = await redis.hvals(f"{_REVISIONS}{identity}")
        return sorted(_readable(found), key=lambda one: -one.revision)

    async def stored(self) -> Stored:
        """All heads as they are, and the counter of changes."""
        async with self._state.connected() as redis:
            changes, *flat = await self._read([HEADS, CHANGES], [_REVISIONS], client=redis)
        heads = zip(flat[::3], flat[1::3], flat[2::3], strict=True)
        return Stored(
            changes,
            tuple(Head(name.decode(), int(number), data) for name, number, data in heads),
        )

    async def changes(self) -> bytes:
        """The counter: what it was before means that nothing was published."""
        async with self._state.connected() as redis:
            found: Any = await redis.get(CHANGES)
        return found or b"0"

    async def before(self, head: Head) -> list[Revision]:
        """The few revisions before one, newest first, those that cannot be read left out."""
        first = max(1, head.revision - _LOOKED_BACK)
        numbers = [str(number) for number in range(head.revision - 1, first - 1, -1)]
        if not numbers:
            return []
        async with self._state.connected() as redis:
            found: Any = await redis.hmget(f"{_REVISIONS}{head.id}", numbers)
        return _readable([data for data in found if data is not None])

    async def seed(self, texts: Mapping[str, str], author: str, note: str) -> bool:
        """Publishes checked policies, texts by their id, where none is stored at all; says
        whether it did.
        """
        now = time.time()
        made = [Revision(name, 1, text, author, note, now) for name, text in texts.items()]
        if not made:
            return False
        keys = [HEADS, CHANGES, *(f"{_REVISIONS}{one.id}" for one in made)]
        arguments = [word for one in made for word in (one.id, one.to_json())]
        async with self._state.connected() as redis:
            return bool(await self._seed(keys, arguments, client=redis))

    async def _head(self, identity: str) -> int:
        async with self._state.connected() as redis:
            number = await redis.hget(HEADS, identity)
        if number is None:
            raise NotFound("there is no such policy", code="policy_not_found")
        return int(number)


async def check_policy(text: str) -> Policy:
    """The policy that a text is; it is read on a thread, since that may take a while.

    Raises ``TooLarge``, and ``BadRequest`` where it is none.
    """
    return await asyncio.to_thread(_checked, text)


def _checked(text: str) -> Policy:
    if len(text) > MOST_BYTES or len(text.encode("utf-8", "replace")) > MOST_BYTES:
        raise TooLarge(f"the policy is longer than {MOST_BYTES} bytes", code="policy_too_large")
    try:
        _check_shape(text)
        return parse_policy(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        message = f"the policy{place}: not YAML"
        raise BadRequest(message, code="policy_invalid", param="text") from None
    except ConfigurationError as error:
        message = str(error)[:_LONGEST_FAULT]
        raise BadRequest(message, code="policy_invalid", param="text") from None


def _check_shape(text: str) -> None:
    """Refuses, at the first sign, what takes a reader of YAML minutes or more memory than there
    is. Raises ``ConfigurationError`` and ``YAMLError``.
    """
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ConfigurationError("a policy that is published has no aliases (as *name)")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _DEEPEST:
            raise ConfigurationError(f"the policy is nested deeper than {_DEEPEST} levels")


def _check_words(author: str, note: str) -> None:
    for name, value, longest in (
        ("author", author, _LONGEST_AUTHOR),
        ("note", note, _LONGEST_NOTE),
    ):
        if len(value) > longest:
            raise BadRequest(f"{name} is longer than {longest} characters", param=name)


def _readable(found: Sequence[bytes]) -> list[Revision]:
    revisions = []
    for data in found:
        try:
            revisions.append(Revision.from_json(data))
        except RevisionFormatError:
            continue
    return revisions
