"""The world that a random stream runs in: a loop whose time is virtual, an upstream and a guard.

Everything waits as long as it draws, and no time passes over it.
"""

from __future__ import annotations

import asyncio
import json
import random
import selectors
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import cache
from typing import Any, Final

from benchmarks.random_streams import Script
from benchmarks.random_texts import MINOR, SEVERE, SYMBOLS, flat
from models.inputs import GuardInput
from models.taxonomy import CATEGORIES, SIGNALS, Role, Severity
from models.verdict import Coverage, Verdict
from service.errors import GuardUnavailable, UpstreamMalformed, UpstreamTimeout
from service.exchange import Dialect
from service.headers import Headers

GUARD_SECONDS: Final = 10.0
"""So long the gateway waits for a verdict."""
_STALL_SECONDS: Final = 60.0
_TURNS: Final = 100_000


class Violation(AssertionError):
    """What must not be; ``early`` characters were sent before their verdict."""

    def __init__(self, what: str, early: int = 0) -> None:
        super().__init__(what)
        self.early = early


# --- Time ---------------------------------------------------------------------------------------
class _Selector(selectors.SelectSelector):
    """Waits for nothing: where nobody has anything to do, the time passes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.turns = 0

    def select(self, timeout: float | None = None) -> list[Any]:
        """One turn of the loop. Raises ``Violation`` where nothing will ever happen."""
        self.turns += 1
        if timeout is None:
            raise Violation("everybody waits, and for nothing")
        if self.turns > _TURNS:
            raise Violation(f"it did not end within {_TURNS} turns")
        self.now += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop without sockets, whose time is what its timers say."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        """Virtual seconds."""
        return self._virtual.now

    def end(self) -> None:
        """Ends what is left, and closes."""
        self.begin()
        left = asyncio.all_tasks(self)
        for task in left:
            task.cancel()
        if left:
            self.run_until_complete(asyncio.wait(left))
        self.run_until_complete(self.shutdown_asyncgens())
        self.close()

    def begin(self) -> None:
        """Counts turns from here."""
        self._virtual.turns = 0


# --- The upstream and the guard -----------------------------------------------------------------
class _Stream:
    """See ``UpstreamStream``."""

    def __init__(self, script: Script, draw: random.Random) -> None:
        self._script = script
        self._draw = draw
        self._is_slow = draw.random() < 0.15
        self.status = script.status
        is_json = script.fault in ("a status", "no stream")
        kind = "application/json" if is_json else "text/event-stream"
        self.headers: Headers = (("content-type", kind),)

    def seconds(self) -> float:
        return 0.0

    async def read(self) -> bytes:
        return b"".join(self._script.chunks)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        draw = self._draw
        for chunk in self._script.chunks:
            if self._is_slow and draw.random() < 0.1:
                await asyncio.sleep(draw.uniform(0.0, 15.0))
            await pause(draw)
            yield chunk
        if self._script.fault == "a stall":
            await asyncio.sleep(_STALL_SECONDS)
            raise UpstreamTimeout("the upstream did not answer in time")
        if self._script.fault == "broken off":
            raise UpstreamMalformed("the upstream's answer broke off before its end")


class ScriptedUpstream:
    """See ``Route``: another script for each attempt."""

    name = "fuzz"

    def __init__(self, dialect: Dialect, draw: random.Random) -> None:
        self._dialect = dialect
        self._draw = draw
        self._symbols = iter(SYMBOLS)
        self.scripts: list[Script] = []
        self.open = 0

    def serves(self, _: str) -> bool:
        return True

    @asynccontextmanager
    async def stream(self, path: str, body: bytes, _: Mapping[str, str]) -> AsyncIterator[_Stream]:
        assert path == self._dialect.path
        count = self._dialect.parse(json.loads(body)).choices
        script = Script(self._draw, self._symbols, self._dialect.name, count)
        self.scripts.append(script)
        self.open += 1
        try:
            await pause(self._draw)
            yield _Stream(script, self._draw)
        finally:
            self.open -= 1


class MarkerGuard:
    """See ``VerdictCache``. Keeps what it has cleared, flat, in its order."""

    def __init__(self, draw: random.Random, stops: tuple[str, ...]) -> None:
        self._draw = draw
        self._stops = stops
        self._left = draw.randrange(8) if draw.random() < 0.05 else 1 << 30
        self._is_slow = draw.random() < 0.1
        self.cleared: list[str] = []
        self.has_failed = False
        self.has_flagged = False

    async def judge(
        self, items: Sequence[GuardInput], _: Sequence[bytes], **_how: bool
    ) -> list[Verdict]:
        draw = self._draw
        await pause(draw)
        if self._is_slow and draw.random() < 0.3:
            seconds = draw.uniform(0.0, GUARD_SECONDS * 1.1)
            self.has_failed |= seconds >= GUARD_SECONDS
            await asyncio.sleep(seconds)
        self._left -= 1
        if self._left < 0:
            self.has_failed = True
            raise GuardUnavailable("the guard is gone")
        verdicts = []
        for item in items:
            level = Severity.SEVERE if SEVERE in item.text else Severity.NONE
            if level is Severity.NONE and MINOR in item.text:
                level = Severity.MINOR
            verdicts.append(verdict(item.role, level, draw.random() < 0.2))
            if any(stop in item.text for stop in self._stops):
                self.has_flagged = True
            elif item.role == "response":
                self.cleared.append(flat(item.text))
        return verdicts


async def pause(draw: random.Random) -> None:
    """Lets others go first, for a few turns of the loop."""
    for _ in range(draw.choice((0, 0, 1, 3))):
        await asyncio.sleep(0)


@cache
def verdict(role: Role, level: Severity, is_risky: bool) -> Verdict:
    """That a text is of this level; ``is_risky`` where it is safe and looks doubtful."""
    low = 0.4 if is_risky else 0.0
    minor, moderate, severe = (0.9 if level >= one else low for one in (1, 2, 3))
    scores = (0.9 if level else 0.0, *(0.0,) * (len(CATEGORIES) - 1))
    signals = (0.0,) * len(SIGNALS)
    return Verdict(role, (minor, moderate, severe), scores, signals, Coverage(1, 1, 1))
