"""Rate limits of API keys: sliding windows that all replicas share, by the clock of Redis.

A window is cut into 50 slices that are counted each. The oldest counts whole although part of it
has left the window, so that in no time of a window's length more requests pass than the limit says;
room comes back a fiftieth of the window late at most. A refused request costs nothing.

In Redis a window is ``sg1:{limits:<key id>}:<route or *>:<seconds>``, a hash of slice → count that
expires with the window. While Redis is away, or slow, each replica counts by itself.
"""

from __future__ import annotations

import math
import time
from asyncio import timeout
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from service.errors import RateLimited, StateUnavailable
from service.keys import EVERY_ROUTE, Limits, Rate
from service.state import State

SLICES: Final = 50
"""Slices of a window; one second has whole microseconds in each."""

# KEYS: one a window. ARGV: for each window the microseconds of a slice, and the limit. Returns, for
# each, what is left, microseconds until there is room (0 where there is), and until all is free.
# A slice that lies ahead was counted before the clock was set back: it counts as of now, so that a
# wrong clock neither frees a key nor locks it out for longer than a window.
_TAKE: Final = f"""
local slices = {SLICES}
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local windows, has_room = {{}}, true
for i, key in ipairs(KEYS) do
  local slice, limit = tonumber(ARGV[2 * i - 1]), tonumber(ARGV[2 * i])
  local current = math.floor(now / slice)
  local one = {{used = 0, counts = {{}}, gone = {{}}, ahead = 0, current = current, slice = slice}}
  local flat = redis.call('HGETALL', key)
  for j = 1, #flat, 2 do
    local at, count = tonumber(flat[j]), tonumber(flat[j + 1])
    if at > current then
      one.ahead = one.ahead + count
    elseif at >= current - slices then
      one.counts[#one.counts + 1] = {{at, count}}
    end
    if at > current or at < current - slices then one.gone[#one.gone + 1] = flat[j] end
    if at >= current - slices then one.used = one.used + count end
  end
  if one.ahead > 0 then one.counts[#one.counts + 1] = {{current, one.ahead}} end
  if one.used >= limit then has_room = false end
  windows[i] = one
end
local answer = {{}}
for i, one in ipairs(windows) do
  local key, limit, retry = KEYS[i], tonumber(ARGV[2 * i]), 0
  local added = one.ahead + (has_room and 1 or 0)
  if #one.gone > 0 then redis.call('HDEL', key, unpack(one.gone)) end
  if added > 0 then
    redis.call('HINCRBY', key, string.format('%.0f', one.current), added)
    redis.call('PEXPIRE', key, math.ceil(one.slice * (slices + 2) / 1000))
  end
  table.sort(one.counts, function(a, b) return a[1] < b[1] end)
  if one.used >= limit then
    local leaving = 0
    for _, count in ipairs(one.counts) do
      leaving = leaving + count[2]
      if one.used - leaving < limit then
        retry = (count[1] + slices + 1) * one.slice - now
        break
      end
    end
  end
  if has_room then
    one.used = one.used + 1
    one.counts[#one.counts + 1] = {{one.current, 1}}
  end
  local newest = one.counts[#one.counts]
  answer[#answer + 1] = math.max(limit - one.used, 0)
  answer[#answer + 1] = retry
  answer[#answer + 1] = newest and (newest[1] + slices + 1) * one.slice - now or 0
end
return answer
"""


@dataclass(frozen=True, slots=True)
class Allowance:
    """One window after a request was let in or refused."""

    rate: Rate
    remaining: int
    retry_seconds: float
    """Until this window has room; 0 where it had."""
    reset_seconds: float
    """Until nothing is counted in it any more."""


@dataclass(slots=True)
class LimitCounts:
    """What the limits did, for metrics."""

    shared: int = 0
    """Requests that were counted in Redis."""
    local: int = 0
    """Requests that this replica counted by itself."""
    refused: int = 0


Window = tuple[str, Rate]
"""What is counted (a key id and a route, or ``*``), and how much of it may be."""


class RateLimits:
    """Lets requests in, or refuses them, by the limits of their key.

    ``deadline_seconds`` bounds what Redis may cost a request; ``most_local`` the windows that are
    counted here while it is away.
    """

    def __init__(
        self, state: State, *, deadline_seconds: float = 0.25, most_local: int = 10_000
    ) -> None:
        self.counts = LimitCounts()
        self._state = state
        self._deadline_seconds = deadline_seconds
        self._script = state.script(_TAKE)
        self._local = LocalWindows(most_local)

    async def admit(self, key_id: str, route: str, limits: Limits) -> Mapping[str, str]:
        """Counts a request; returns headers that say what is left. Raises ``RateLimited``."""
        windows = [
            (bucket, rate) for bucket in (route, EVERY_ROUTE) for rate in limits.get(bucket, ())
        ]
        if not windows:
            return {}
        try:
            # The outer deadline: a slow moment is no reason to call the whole of state lost.
            async with timeout(self._deadline_seconds):
                allowances = await self._shared(key_id, windows)
            self.counts.shared += 1
        except (StateUnavailable, TimeoutError):
            named = [(f"{key_id}:{bucket}", rate) for bucket, rate in windows]
            allowances = self._local.take(named)
            self.counts.local += 1
        full = max(allowances, key=lambda one: one.retry_seconds)
        if full.retry_seconds > 0:
            self.counts.refused += 1
            raise RateLimited(
                f"this API key may send {full.rate} requests:"
                f" try again in {math.ceil(full.retry_seconds)} s",
                full.retry_seconds,
                shown(full),
            )
        return shown(min(allowances, key=lambda one: one.remaining / one.rate.requests))

    async def _shared(self, key_id: str, windows: Sequence[Window]) -> list[Allowance]:
        keys = [f"sg1:{{limits:{key_id}}}:{bucket}:{rate.seconds}" for bucket, rate in windows]
        arguments = [
            value for _, rate in windows for value in (_slice_microseconds(rate), rate.requests)
        ]
        async with self._state.connected() as redis:
            flat = await self._script(keys, arguments, client=redis)
        return [
            Allowance(rate, remaining, retry / 1e6, reset / 1e6)
            for (_, rate), remaining, retry, reset in zip(
                windows, flat[::3], flat[1::3], flat[2::3], strict=True
            )
        ]


class LocalWindows:
    """The same windows in memory, by a clock that never goes back. The least used go first."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._counts: OrderedDict[tuple[str, int], dict[int, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._counts)

    def take(self, windows: Sequence[Window]) -> list[Allowance]:
        """Counts a request in every window where all have room, else in none."""
        now = round(self._clock() * 1e6)
        found = [(rate, self._counted(name, rate, now)) for name, rate in windows]
        has_room = all(sum(counts.values()) < rate.requests for rate, counts in found)
        answer = []
        for rate, counts in found:
            retry = _until_room(rate, counts, now)
            if has_room:
                current = now // _slice_microseconds(rate)
                counts[current] = counts.get(current, 0) + 1
            reset = _leaves(max(counts), rate, now) if counts else 0.0
            remaining = max(rate.requests - sum(counts.values()), 0)
            answer.append(Allowance(rate, remaining, retry, reset))
        return answer

    def _counted(self, name: str, rate: Rate, now: int) -> dict[int, int]:
        key = (name, rate.seconds)
        counts = self._counts.setdefault(key, {})
        self._counts.move_to_end(key)
        oldest = now // _slice_microseconds(rate) - SLICES
        for at in [at for at in counts if at < oldest]:
            del counts[at]
        while len(self._counts) > self._most:
            self._counts.popitem(last=False)
        return counts


def _slice_microseconds(rate: Rate) -> int:
    return rate.seconds * 1_000_000 // SLICES


def _leaves(at: int, rate: Rate, now: int) -> float:
    """Seconds until a slice is out of the window."""
    return ((at + SLICES + 1) * _slice_microseconds(rate) - now) / 1e6


def _until_room(rate: Rate, counts: Mapping[int, int], now: int) -> float:
    used = sum(counts.values())
    for at in sorted(counts):
        if used < rate.requests:
            break
        used -= counts[at]
        if used < rate.requests:
            return _leaves(at, rate, now)
    return 0.0


def shown(one: Allowance) -> dict[str, str]:
    """A window as OpenAI's headers have it."""
    return {
        "x-ratelimit-limit-requests": str(one.rate.requests),
        "x-ratelimit-remaining-requests": str(one.remaining),
        "x-ratelimit-reset-requests": spoken(one.reset_seconds),
    }


def spoken(seconds: float) -> str:
    """A duration as OpenAI writes it: ``17ms``, ``1s``, ``6m0s``, ``1h0m5s``."""
    if seconds < 1:
        return f"{max(0, math.ceil(seconds * 1000))}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{rest}s"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
