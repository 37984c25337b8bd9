"""What the tests of events share: records of many kinds, and a state with what reads them."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.taxonomy import CATEGORIES, SIGNALS
from service.audit import Audit
from service.event_index import EventIndex
from service.events import Event, Events, Filters
from service.kept_texts import KeptTexts
from service.records import Record, Recorder
from service.spool import Spool
from service.state import State

RECORD = Record(
    id="0" * 32,
    time=1_700_000_000.25,
    request_id="request-1",
    key_id=None,
    route="/v1/chat/completions",
    dialect="openai.chat",
    model="a-model",
    direction="prompt",
    field="messages[0].content",
    policy="default@1",
    guard="guard@1",
    level="none",
    severity_score=0.1,
    category_scores=(0.1,) * len(CATEGORIES),
    signal_scores=(0.1,) * len(SIGNALS),
    rule=2,
    action="allow",
    outcome="allowed",
    attempts=1,
    prompt_tokens=12,
    response_tokens=None,
    wasted_tokens=0,
    guard_milliseconds=1.25,
    upstream_milliseconds=200.0,
    total_milliseconds=210.5,
    hash="ab" * 32,
    weight=1.0,
)

ROUTES = ("/v1/chat/completions", "/v1/moderations")
KEYS = (None, "key-a", "key-b")
POLICIES = ("default@1", "default@2", "strict@1")
MODELS = ("a-model", "another/model", "a-model:7b@q4")
LEVELS = (None, "none", "minor", "moderate", "severe")
OUTCOMES = ("allowed", "annotated", "blocked", "error")
WEIGHTS = (1.0, 4.0)


def scores(*fired: str) -> tuple[float, ...]:
    """Category scores of which these fire."""
    return tuple(0.9 if name in fired else 0.1 for name in CATEGORIES)


def some_records(count: int, seed: int = 7) -> list[Record]:
    """Records that differ in everything that is filtered by."""
    drawn = random.Random(seed)  # noqa: S311 - test data
    return [
        replace(
            RECORD,
            id=f"{seed:08x}{number:024x}",
            request_id=f"request-{number // 2}",
            key_id=drawn.choice(KEYS),
            route=drawn.choice(ROUTES),
            policy=drawn.choice(POLICIES),
            model=drawn.choice(MODELS),
            direction=drawn.choice(("prompt", "response")),
            level=drawn.choice(LEVELS),
            category_scores=scores(*drawn.sample(CATEGORIES[:4], drawn.randrange(3))),
            outcome=drawn.choice(OUTCOMES),
            weight=drawn.choice(WEIGHTS),
        )
        for number in range(count)
    ]


@dataclass
class Kept:
    """What works over one state."""

    state: State
    recorder: Recorder
    index: EventIndex
    events: Events
    audit: Audit
    texts: KeptTexts

    async def write(self, *records: Record) -> None:
        """Writes one after the other, and indexes them."""
        for record in records:
            await self.recorder.write([record])
        await self.index.catch_up()

    async def ids(self, filters: Filters | None = None, limit: int = 500) -> list[str]:
        """Of the first page, newest first."""
        page = await self.events.find(filters or Filters(), limit)
        return [event.record.id for event in page.events]

    async def keys(self, pattern: str) -> set[str]:
        """Names of keys in the server."""
        async with self.state.connected() as redis:
            found: Any = await redis.keys(pattern)
        return {key.decode() for key in found}

    async def every(self, filters: Filters, limit: int) -> list[Event]:
        """All pages, put together."""
        found: list[Event] = []
        cursor: str | None = None
        while True:
            page = await self.events.find(filters, limit, cursor)
            found += page.events
            cursor = page.next
            if cursor is None:
                return found


@asynccontextmanager
async def kept(url: str, directory: Path, **options: Any) -> AsyncIterator[Kept]:
    """``options``: of the recorder; ``index`` and ``texts`` hold those of the others."""
    of_index, of_texts = options.pop("index", {}), options.pop("texts", {})
    state = await State.open(url, data_directory=directory, command_seconds=20.0)
    spool = await Spool.open(directory / "spool.jsonl", 2**20)
    recorder = Recorder(state, spool, **options)
    audit = Audit(state)
    index = EventIndex(state, **of_index)
    try:
        yield Kept(
            state, recorder, index, Events(state), audit, KeptTexts(state, audit, **of_texts)
        )
    finally:
        await index.close()
        await recorder.close()
        await spool.close()
        await state.close()


async def until(condition: Any, patience: float = 10.0) -> None:
    """Returns when ``await condition()`` is true."""
    async with asyncio.timeout(patience):
        while not await condition():  # noqa: ASYNC110 - the server has no event
            await asyncio.sleep(0.01)


def ids_of(records: Sequence[Record]) -> list[str]:
    """Their ids, newest first."""
    return [record.id for record in reversed(records)]
