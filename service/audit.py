"""Who looked at a kept text, and who deleted: an append-only stream, ``sg1:{audit}:stream``.

An entry says when (its id is the server's time), with which key, what was done, and to which
records. Nothing here changes or deletes one; the oldest go when there are ``most`` of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from service.errors import BadRequest
from service.state import State

AUDIT: Final = "sg1:{audit}:stream"
MOST_LISTED: Final = 500
MOST_RECORDS: Final = 1000
"""Record ids of one entry; longer lists take several."""
_CURSOR: Final = re.compile(r"a1\.([0-9]{1,15}-[0-9]{1,15})")

Action = Literal["read_text", "delete_subject", "deleted", "publish_policy", "published"]
"""``delete_subject`` is written before, ``deleted`` after, with records that are gone;
``publish_policy`` before with the policy's id, ``published`` after with ``id@revision``.
"""


@dataclass(frozen=True, slots=True)
class Act:
    """An entry. ``key_id`` is None where keys are off; ``time`` is in seconds since 1970."""

    id: str
    time: float
    key_id: str | None
    action: str
    record_ids: tuple[str, ...]


class Audit:
    """Writes and reads entries. Raises ``StateUnavailable`` while Redis is away, so that what must
    be recorded is not done unrecorded.
    """

    def __init__(self, state: State, *, most: int = 200_000) -> None:
        self._state = state
        self._most = most

    async def add(self, key_id: str | None, action: Action, record_ids: Sequence[str]) -> None:
        """Returns when it is written."""
        for start in range(0, max(1, len(record_ids)), MOST_RECORDS):
            entry: dict[Any, Any] = {
                "key": key_id or "",
                "action": action,
                "records": " ".join(record_ids[start : start + MOST_RECORDS]),
            }
            async with self._state.connected() as redis:
                await redis.xadd(AUDIT, entry, maxlen=self._most, approximate=True)

    async def list(
        self, limit: int = 50, cursor: str | None = None
    ) -> tuple[list[Act], str | None]:
        """Entries, newest first, and the cursor of the next page. ``BadRequest``: a bad cursor."""
        limit = max(1, min(limit, MOST_LISTED))
        upper = "+"
        if cursor is not None:
            place = _CURSOR.fullmatch(cursor)
            if place is None:
                raise BadRequest(
                    "cursor is none of ours: send what an earlier page gave as next, unchanged",
                    param="cursor",
                )
            upper = f"({place[1]}"
        async with self._state.connected() as redis:
            found: Any = await redis.xrevrange(AUDIT, max=upper, count=limit + 1)
        acts = [_act(name.decode(), values) for name, values in found[:limit]]
        return acts, f"a1.{acts[-1].id}" if len(found) > limit else None


def _act(name: str, values: dict[bytes, bytes]) -> Act:
    return Act(
        name,
        int(name.partition("-")[0]) / 1000,
        _text(values, b"key") or None,
        _text(values, b"action"),
        tuple(_text(values, b"records").split()),
    )


def _text(values: dict[bytes, bytes], name: bytes) -> str:
    return values.get(name, b"").decode(errors="replace")
