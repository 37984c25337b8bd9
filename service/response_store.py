"""Released responses, kept here so that ``previous_response_id`` and reading one again work.

The upstream is told to store nothing: what it keeps was not judged. Kept is only what a client
got, for a while, and no more than so many.

In Redis a response is JSON under ``sg1:{response}:<owner>:<id>``. Beside them stands one sorted set
of these keys by the time of their coming, in microseconds of the server's clock.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from service.body import dumps
from service.state import State

INDEX: Final = "sg1:{response}"
_LONGEST_IDENTITY: Final = 256
MOST_LISTED: Final = 100
"""Items of one page."""

# KEYS: index, entry. ARGV: JSON, seconds to keep it, most entries. It trims first, because deleting
# is allowed in a server that is full and adding is not; and not without end, so that a call stays
# short after the bound was lowered.
_KEEP: Final = """
local index, entry = KEYS[1], KEYS[2]
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
redis.call('ZREMRANGEBYSCORE', index, '-inf', string.format('%.0f', now - ARGV[2] * 1000000))
local arriving = redis.call('ZSCORE', index, entry) and 0 or 1
local over = redis.call('ZCARD', index) + arriving - tonumber(ARGV[3])
if over > 0 then
  local oldest = redis.call('ZPOPMIN', index, math.min(over, 1000))
  for i = 1, #oldest, 2 do redis.call('DEL', oldest[i]) end
end
redis.call('SET', entry, ARGV[1], 'EX', ARGV[2])
redis.call('ZADD', index, string.format('%.0f', now), entry)
"""


@dataclass(frozen=True, slots=True)
class Stored:
    """A response as it was released, and the conversation up to it: input items, then output."""

    response: Mapping[str, Any]
    items: tuple[Mapping[str, Any], ...]


class ResponseStore:
    """Keeps responses apart by ``owner``, a keyed hash of the caller.

    What is asked of it raises ``StateUnavailable`` while Redis is away.
    """

    def __init__(
        self, state: State, *, seconds: int = 86_400, most: int = 10_000, most_bytes: int = 2**18
    ) -> None:
        self._state = state
        self._seconds = seconds
        self._most = most
        self._most_bytes = most_bytes
        self._script = state.script(_KEEP)

    async def keep(
        self, owner: str, response: Mapping[str, Any], items: Sequence[Mapping[str, Any]]
    ) -> bool:
        """Keeps what was released; says whether it did: it must have an id and not be too large."""
        key = _key(owner, response.get("id"))
        data = dumps({"response": response, "items": list(items)}).encode()
        if key is None or len(data) > self._most_bytes or not self._most:
            return False
        async with self._state.connected() as redis:
            await self._script([INDEX, key], [data, self._seconds, self._most], client=redis)
        return True

    async def find(self, owner: str, identity: str) -> Stored | None:
        """The response of ``owner`` with this id, if it is kept still."""
        key = _key(owner, identity)
        if key is None:
            return None
        async with self._state.connected() as redis:
            data = await redis.get(key)
        if data is None:
            return None
        value = json.loads(data)
        return Stored(value["response"], tuple(value["items"]))

    async def delete(self, owner: str, identity: str) -> bool:
        """Forgets a response; says whether there was one."""
        key = _key(owner, identity)
        if key is None:
            return False
        async with self._state.connected() as redis, redis.pipeline(transaction=True) as both:
            both.delete(key)
            both.zrem(INDEX, key)
            deleted, _ = await both.execute()
        return bool(deleted)


def expanded(body: Mapping[str, Any], stored: Stored) -> dict[str, Any]:
    """A request that goes on from ``stored``, as one that holds the whole conversation."""
    shown = {key: value for key, value in body.items() if key != "previous_response_id"}
    return shown | {"input": [*stored.items, *_input(body)]}


def items_of(body: Mapping[str, Any], response: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The conversation after ``response`` to ``body``, whose input holds all before it."""
    return [*_input(body), *_output(response)]


def inputs_of(stored: Stored) -> list[Mapping[str, Any]]:
    """What the response was an answer to."""
    output = _output(stored.response)
    items = list(stored.items)
    if output and items[-len(output) :] == output:
        del items[-len(output) :]
    return items


def listed(
    stored: Stored, *, limit: int = 20, after: str | None = None, order: str = "desc"
) -> dict[str, Any]:
    """A page of the input items, as ``GET /v1/responses/{id}/input_items`` answers. An item
    without an id gets its place for one, and a text stands in a part, as clients' types want it.
    """
    items = [
        {"type": "message", "id": f"item_{number}", **_in_parts(item)}
        for number, item in enumerate(inputs_of(stored))
    ]
    if order == "desc":
        items.reverse()
    start = next((i for i, item in enumerate(items, 1) if item["id"] == after), 0)
    page = items[start : start + max(1, min(limit, MOST_LISTED))]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + len(page) < len(items),
    }


def _key(owner: str, identity: Any) -> str | None:
    if not isinstance(identity, str) or not 0 < len(identity) <= _LONGEST_IDENTITY:
        return None
    return f"{INDEX}:{owner}:{identity}"


def _input(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A request's input as a list of items; what is not one is left for the dialect to refuse."""
    value = body.get("input")
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    return value if isinstance(value, list) else []


def _output(response: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The output items as input. Reasoning may be sent only with what proves it."""
    output = response.get("output")
    return [
        _as_input(item)
        for item in (output if isinstance(output, list) else ())
        if item.get("type") != "reasoning" or item.get("encrypted_content")
    ]


def _as_input(item: Mapping[str, Any]) -> Mapping[str, Any]:
    content = item.get("content")
    if not isinstance(content, list):
        return item
    return {**item, "content": [_part_as_input(part) for part in content]}


def _in_parts(item: Mapping[str, Any]) -> Mapping[str, Any]:
    content = item.get("content")
    if not isinstance(content, str):
        return item
    part: dict[str, Any] = {"type": "input_text", "text": content}
    if item.get("role") == "assistant":
        part = {"type": "output_text", "text": content, "annotations": []}
    return {**item, "content": [part]}


def _part_as_input(part: Any) -> Any:
    """Without token probabilities; a refusal as a text, since vLLM fails at one in an input."""
    if not isinstance(part, dict):
        return part
    if part.get("type") == "refusal":
        return {"type": "output_text", "text": part.get("refusal"), "annotations": []}
    return {key: value for key, value in part.items() if key != "logprobs"}
