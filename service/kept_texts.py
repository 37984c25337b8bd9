"""Texts of records, kept apart from their scores, as long and as much of them as is said.

A text is JSON under ``sg1:{records}:text:<record id>``, with an expiry of its own. Beside them
stands one sorted set of record ids by time, which bounds their number, and one for each subject,
which finds a subject's texts after their records went. A text that cannot be kept is missed and
counted, and holds nobody up.

A subject is whom the client named as its user, as a keyed hash: ``subject_of``.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from service.audit import Audit
from service.body import dumps
from service.errors import StateUnavailable
from service.records import ENTRIES, STREAM
from service.redaction import normalised, redacted
from service.state import State

TEXTS: Final = "sg1:{records}:texts"
_TEXT: Final = "sg1:{records}:text:"
_SUBJECTS: Final = f"{TEXTS}:"
Keeping = Literal["redacted", "full"]
_TORN: Final = 256
"""Characters at the end of a cut text that may be part of what would have been redacted."""

# Removes a text and its place among its subject's, which stands at the beginning of its JSON.
_FORGET: Final = """
local function forget(id, texts, subjects)
  local data = redis.call('GET', texts .. id)
  local subject = data and data:match('^{"subject":"(%x+)"')
  if subject then redis.call('ZREM', subjects .. subject, id) end
  return redis.call('DEL', texts .. id)
end
"""

# KEYS: index of texts, text, index of the subject (or the first again). ARGV: JSON, seconds, most
# texts, record id, beginnings of a text's key and of a subject's. It trims first, because deleting
# is allowed in a server that is full and adding is not.
_KEEP: Final = (
    _FORGET
    + """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local gone = string.format('%.0f', now - ARGV[2] * 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', gone)
local arriving = redis.call('ZSCORE', KEYS[1], ARGV[4]) and 0 or 1
local over = redis.call('ZCARD', KEYS[1]) + arriving - tonumber(ARGV[3])
if over > 0 then
  local oldest = redis.call('ZPOPMIN', KEYS[1], math.min(over, 1000))
  for i = 1, #oldest, 2 do forget(oldest[i], ARGV[5], ARGV[6]) end
end
redis.call('SET', KEYS[2], ARGV[1], 'EX', ARGV[2])
redis.call('ZADD', KEYS[1], string.format('%.0f', now), ARGV[4])
if KEYS[3] ~= KEYS[1] then
  redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', gone)
  redis.call('ZADD', KEYS[3], string.format('%.0f', now), ARGV[4])
  redis.call('EXPIRE', KEYS[3], ARGV[2])
end
"""
)

# KEYS: stream, entries, index of texts. ARGV: beginnings of a text's key and of a subject's, then
# record ids.
_DELETE: Final = (
    _FORGET
    + """
local deleted = {}
for i = 3, #ARGV do
  local id = ARGV[i]
  local entry = redis.call('HGET', KEYS[2], id)
  local gone = forget(id, ARGV[1], ARGV[2])
  if entry then gone = gone + redis.call('XDEL', KEYS[1], entry) end
  redis.call('HDEL', KEYS[2], id)
  redis.call('ZREM', KEYS[3], id)
  if gone > 0 then deleted[#deleted + 1] = id end
end
return deleted
"""
)

# KEYS: stream. ARGV: first entry, how many, what the JSON of a subject's record holds. Returns the
# last entry that was looked at (empty at the end) and the ids. It reads the stream and no index:
# a record that is not indexed yet must go too.
_OF_SUBJECT: Final = """
local found, last = {}, ''
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', ARGV[2])) do
  last = entry[1]
  if (entry[2][4] or ''):find(ARGV[3], 1, true) then found[#found + 1] = entry[2][2] end
end
return {last, found}
"""
_LOOKED_AT: Final = 1000


@dataclass(frozen=True, slots=True)
class KeptText:
    """A text as it was kept. ``is_cut``: it was longer."""

    text: str
    kept: str
    is_cut: bool


@dataclass(slots=True)
class TextCounts:
    """What became of texts since the start; only ever growing."""

    kept: int = 0
    missed: int = 0
    """Could not be kept because Redis was away or full."""


def text_key(record_id: str) -> str:
    """Where the text of a record is kept."""
    return f"{_TEXT}{record_id}"


def subject_of(body: Mapping[str, Any], hash_key: bytes) -> str | None:
    """Whom a request names as its user, hashed: ``safety_identifier``, ``user`` or
    ``metadata.user_id``, the first that there is.
    """
    metadata = body.get("metadata")
    inner = metadata.get("user_id") if isinstance(metadata, Mapping) else None
    for value in (body.get("safety_identifier"), body.get("user"), inner):
        if isinstance(value, str) and value:
            return hashed_subject(value, hash_key)
    return None


def hashed_subject(subject: str, hash_key: bytes) -> str:
    """The keyed hash of a subject, in hexadecimal."""
    message = b"subject\0" + subject.encode("utf-8", "surrogatepass")
    return hmac.digest(hash_key, message, "sha256").hex()[:32]


class KeptTexts:
    """Keeps texts for ``seconds``, at most ``most`` of them, ``most_characters`` of each."""

    def __init__(
        self,
        state: State,
        audit: Audit,
        *,
        seconds: int = 7 * 86_400,
        most: int = 10_000,
        most_characters: int = 8192,
    ) -> None:
        self.counts = TextCounts()
        self._state = state
        self._audit = audit
        self._seconds = seconds
        self._most = most
        self._most_characters = most_characters
        self._keep_script = state.script(_KEEP)
        self._delete_script = state.script(_DELETE)
        self._subject_script = state.script(_OF_SUBJECT)

    async def keep(
        self, record_id: str, text: str, keeping: Keeping, subject: str | None = None
    ) -> bool:
        """Keeps a record's text; says whether it could. ``subject`` is the hash of it."""
        shown, is_cut = self._cut(text, keeping)
        data = dumps({"subject": subject, "text": shown, "kept": keeping, "cut": is_cut})
        index = TEXTS if subject is None else f"{_SUBJECTS}{subject}"
        keys = [TEXTS, text_key(record_id), index]
        arguments: list[str | bytes | int] = [
            data.encode("utf-8", "replace"),
            self._seconds,
            self._most,
            record_id,
            _TEXT,
            _SUBJECTS,
        ]
        try:
            async with self._state.connected() as redis:
                await self._keep_script(keys, arguments, client=redis)
        except (StateUnavailable, TimeoutError):
            self.counts.missed += 1
            return False
        self.counts.kept += 1
        return True

    async def look(self, record_id: str, key_id: str | None) -> KeptText | None:
        """The text for somebody to read, which is recorded first: no record, no text."""
        await self._audit.add(key_id, "read_text", [record_id])
        async with self._state.connected() as redis:
            data = await redis.get(text_key(record_id))
        try:
            values = json.loads(data or b"null")
            return KeptText(values["text"], values["kept"], bool(values.get("cut")))
        except (ValueError, TypeError, KeyError):
            # Gone, or kept otherwise by a later version.
            return None

    async def delete(self, *record_ids: str) -> list[str]:
        """Removes records and their texts; returns the ids of which there was anything."""
        deleted: list[str] = []
        for start in range(0, len(record_ids), 256):
            some = record_ids[start : start + 256]
            async with self._state.connected() as redis:
                keys = [STREAM, ENTRIES, TEXTS]
                gone = await self._delete_script(keys, [_TEXT, _SUBJECTS, *some], client=redis)
            deleted += [identity.decode() for identity in gone]
        return deleted

    async def delete_subject(self, subject: str, key_id: str | None) -> list[str]:
        """Removes all texts and records of a subject (its hash); returns the records' ids.

        Counters stay: they say nothing of anybody. A record that waits in a spool comes later, so
        this may be repeated.
        """
        await self._audit.add(key_id, "delete_subject", [])
        async with self._state.connected() as redis:
            kept: Any = await redis.zrange(f"{_SUBJECTS}{subject}", 0, -1)
        deleted = await self._delete_and_say(kept, key_id)
        place, needle = "-", f'"subject":"{subject}"'
        while place:
            async with self._state.connected() as redis:
                arguments: list[str | int] = [place, _LOOKED_AT, needle]
                last, found = await self._subject_script([STREAM], arguments, client=redis)
            deleted += await self._delete_and_say(found, key_id)
            place = f"({last.decode()}" if last else ""
        return deleted

    async def _delete_and_say(self, identities: Sequence[bytes], key_id: str | None) -> list[str]:
        """Deletes and records it at once: the rest may fail, or nobody wait for it."""
        deleted = await self.delete(*(identity.decode() for identity in identities))
        if deleted:
            await self._audit.add(key_id, "deleted", deleted)
        return deleted

    def _cut(self, text: str, keeping: Keeping) -> tuple[str, bool]:
        most = self._most_characters
        if keeping == "full":
            return text[:most], len(text) > most
        # Redacted before it is cut to size, so that no half of an address stays at the end.
        plain = normalised(text[: 2 * most])
        is_torn = len(text) > 2 * most or len(plain) > 2 * most
        shown = redacted(plain[: 2 * most])
        if is_torn:
            shown = shown[:-_TORN]
        return shown[:most], is_torn or len(shown) > most
