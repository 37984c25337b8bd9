"""What reviewers said of texts: an append-only stream, exported as labelled examples.

``sg1:{labels}:stream`` holds JSON without any text, written together with the decision of
``service.reviews``. A text comes from where texts are kept, at the time of the export; so its
retention and its deletion hold for labels too. The oldest go when there are very many.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Container
from dataclasses import asdict, dataclass
from typing import Any, Final

from models.taxonomy import Role
from service.body import dumps
from service.events import Events, Filters
from service.kept_texts import KeptText, KeptTexts
from service.state import State

STREAM: Final = "sg1:{labels}:stream"
SOURCE: Final = "reviews"
"""What labelled examples name as their source."""
VERSION: Final = 1
_CHUNK: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """What a reviewer said of a record's text. ``severity`` is 0 to 3."""

    id: str
    """The record's."""
    request_id: str
    role: Role
    severity: int
    categories: tuple[str, ...]
    refusal: bool | None
    """Whether the text declines; None where nobody said."""
    outcome: str
    """Whether the guard was ``confirmed`` or ``overturned``."""
    reviewer: str
    note: str
    reason: str
    """Why the record was looked at."""
    guard: str
    policy: str
    time: float
    """Seconds since 1970."""

    def to_json(self) -> str:
        """What ``from_json`` reads."""
        return json.dumps({"version": VERSION, **asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, data: bytes | str) -> Label:
        """Keys that are not known are passed over. Raises ``ValueError`` where it is no label, or
        one that a later release wrote in another way.
        """
        values = json.loads(data)
        try:
            if values["version"] > VERSION:
                raise ValueError("a later release wrote it")
            return cls(
                id=values["id"],
                request_id=values["request_id"],
                role=values["role"],
                severity=values["severity"],
                categories=tuple(values["categories"]),
                refusal=values.get("refusal"),
                outcome=values["outcome"],
                reviewer=values["reviewer"],
                note=values.get("note", ""),
                reason=values["reason"],
                guard=values["guard"],
                policy=values["policy"],
                time=values["time"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError("it is not what a label is stored as") from error


@dataclass(slots=True)
class ExportCounts:
    """What an export met."""

    examples: int = 0
    without_text: int = 0
    """Labels whose text was not kept, or not any more."""
    unreadable: int = 0
    known: int = 0
    """Labels that whoever asked has already."""


class Labels:
    """Reads labels. Raises ``StateUnavailable`` while Redis is away."""

    def __init__(self, state: State, events: Events, texts: KeptTexts) -> None:
        self._state = state
        self._events = events
        self._texts = texts

    async def export(
        self,
        key_id: str | None,
        counts: ExportCounts | None = None,
        since: float = 0.0,
        known: Container[str] = (),
    ) -> AsyncGenerator[bytes, None]:
        """JSON lines of labelled examples, oldest first, a page in memory at a time.

        Only labels whose text is kept still become examples. Each text that is read is recorded
        as read by ``key_id``. ``since`` is in seconds since 1970, by the server's clock; labels
        whose id is in ``known`` are passed over.
        """
        counts = ExportCounts() if counts is None else counts
        async for label in self.all(counts, since):
            if label.id in known:
                counts.known += 1
                continue
            text = await self._texts.look(label.id, key_id)
            if text is None:
                counts.without_text += 1
                continue
            prompt = await self._prompt(label, key_id) if label.role == "response" else text.text
            counts.examples += 1
            yield (dumps(_example(label, text, prompt)) + "\n").encode("utf-8", "replace")

    async def all(
        self, counts: ExportCounts | None = None, since: float = 0.0
    ) -> AsyncGenerator[Label, None]:
        """Labels, oldest first. Those that cannot be read here are counted and passed over."""
        place = f"{max(0, int(since * 1000))}-0"
        while True:
            async with self._state.connected() as redis:
                found: Any = await redis.xrange(STREAM, min=place, count=_CHUNK)
            for _, values in found:
                try:
                    yield Label.from_json(values.get(b"data", b""))
                except ValueError:
                    if counts is not None:
                        counts.unreadable += 1
            if len(found) < _CHUNK:
                return
            place = f"({found[-1][0].decode()}"

    async def _prompt(self, label: Label, key_id: str | None) -> str:
        """The text that the answer was an answer to, as far as it was kept; else empty."""
        asked = Filters(request_id=label.request_id, direction="prompt")
        page = await self._events.find(asked, limit=2)
        # Clients choose the ids of requests: of several nobody knows which it was.
        if len(page.events) != 1:
            return ""
        text = await self._texts.look(page.events[0].record.id, key_id)
        return "" if text is None else text.text


def _example(label: Label, text: KeptText, prompt: str) -> dict[str, Any]:
    """As docs/guard.md has it."""
    example: dict[str, Any] = {
        "id": label.id,
        "source": SOURCE,
        "role": label.role,
        "prompt": prompt,
    }
    if label.role == "response":
        example["response"] = text.text
    example |= {
        "unsafe": label.severity > 0,
        "severity": label.severity,
        "categories": None,
        "pku_categories": list(label.categories),
        "refusal": label.refusal,
    }
    if text.is_cut:
        example["judged_in_part"] = True
    return example
