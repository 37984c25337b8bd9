"""One answer of an upstream while it streams in: what was heard of it, and what may go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from contextlib import aclosing
from typing import Final

from service import sse
from service.errors import BadRequest, UpstreamMalformed
from service.exchange import Answer, Choice, Dialect, Exchange, Field
from service.flow import Flow
from service.gate import WHOLE
from service.held import Held
from service.replies import NotOurs, is_stream, parse_answer
from service.upstream import UpstreamResponse, UpstreamStream

HELD_BYTES: Final = 1 << 20
"""The upstream is read no further ahead than this of what was released."""


class StreamedAttempt:
    """Hears one stream, event by event, and holds what may not be sent yet.

    ``numbers`` is what the client calls its choices, in the order of theirs at the upstream. Where
    ``passes`` its events go to the client as they are, else only whole choices of it are spoken.
    ``held_bytes`` bounds what waits, where what is heard is judged on the way.
    """

    def __init__(
        self,
        dialect: Dialect,
        exchange: Exchange,
        number: int,
        numbers: tuple[int, ...],
        *,
        passes: bool,
        held_bytes: int | None,
        examine: Callable[[Iterable[str]], None],
    ) -> None:
        """``examine`` raises for places of an answer that cannot be scanned."""
        self.exchange = exchange
        self.number = number
        self.numbers = numbers
        self.passes = passes
        self.reader = dialect.reader(exchange)
        self.flows = {place: Flow(exchange.context) for place in range(len(numbers))}
        self.answer: Answer | None = None
        self.dropped: set[int] = set()
        """Choices of which nothing more is sent."""
        self.begun: set[int] = set()
        """Choices of which some text was sent."""
        self.released: dict[int, int] = {}
        """Up to how many characters choices may go."""
        self._dialect = dialect
        self._examine = examine
        self._held = Held(frozenset(self.flows))
        self._held_bytes = held_bytes
        self._parser = sse.EventParser(max_event_bytes=HELD_BYTES)
        self._grown: set[int] = set()
        self._ended: set[int] = set()
        self._room = asyncio.Event()

    # --- What comes -----------------------------------------------------------------------------
    async def hear(self, stream: UpstreamStream, on_heard: Callable[[int], None]) -> None:
        """Reads ``stream`` to its end, no further ahead than there is room; ``on_heard`` is told of
        the characters that came with each read. Raises ``UpstreamError``, and ``NotOurs`` where the
        upstream refused.
        """
        if stream.status == 200 and is_stream(stream.headers):
            async with aclosing(stream.chunks()) as chunks:
                async for data in chunks:
                    on_heard(self._hear(data))
                    if self.is_full:
                        self._room.clear()
                        await self._room.wait()
        else:
            on_heard(self._hear(await self._rendered(stream)))
        self._end()

    @property
    def is_full(self) -> bool:
        """Whether no more is read before something was sent."""
        return self._held_bytes is not None and self._held.size >= self._held_bytes

    @property
    def size(self) -> int:
        """Characters that came."""
        return sum(flow.position for flow in self.flows.values())

    def due(self, load: float) -> dict[int, int]:
        """The choices that are worth judging now, and up to where: those that have ended, and all
        where no more can be held, to their end.
        """
        ends = {}
        for place in self.flows if self.is_full else self._grown:
            flow = self.flows[place]
            is_over = self.is_full or place in self._ended
            end = flow.tail() if is_over else flow.due(load)
            if end is not None:
                ends[place] = end
        self._grown.clear()
        return ends

    def _hear(self, data: bytes) -> int:
        """Takes in what came; returns its characters."""
        try:
            return sum([self._hear_event(event) for event in self._parser.feed(data)])
        except BadRequest as error:
            raise _unjudgeable(error) from None

    def _hear_event(self, event: sse.Event) -> int:
        if not event.data:
            # A comment: what an upstream says in one is no part of an answer, and not judged.
            return 0
        heard = self.reader.hear(event)
        if heard.unscannable:
            self._examine(heard.unscannable)
        characters = 0
        for choice, name, track, text in heard.said:
            self.flows[choice].add(name, track, text)
            self._grown.add(choice)
            characters += len(text)
        self._grown |= heard.ends
        self._ended |= heard.ends
        if self.passes:
            self._held.add(event, heard, self.flows)
        return characters

    def _end(self) -> None:
        try:
            for event in self._parser.finish():
                self._hear_event(event)
            self.answer = self.reader.answer()
        except BadRequest as error:
            raise _unjudgeable(error) from None
        if len(self.answer.choices) < len(self.numbers):
            raise UpstreamMalformed("the upstream's stream has fewer choices than were asked for")

    async def _rendered(self, stream: UpstreamStream) -> bytes:
        """An answer that is no stream, as one: an upstream need not know how to stream."""
        whole = UpstreamResponse(stream.status, stream.headers, await stream.read(), 0.0)
        if whole.status >= 400:
            raise NotOurs(whole)
        answer = parse_answer(self._dialect, self.exchange, whole)
        return self._dialect.streamed(self.exchange, answer.body)

    # --- What is judged -------------------------------------------------------------------------
    def choices(self) -> dict[int, Choice]:
        """The whole choices, by the client's numbers; only once it has ended."""
        assert self.answer is not None
        return {
            number: choice if self.passes else self._dialect.renumbered(choice, number)
            for number, choice in zip(self.numbers, self.answer.choices, strict=False)
        }

    def pieces(self, ends: Mapping[int, int]) -> dict[int, tuple[Field, ...]]:
        """What is to be judged to clear choices up to these characters."""
        return {place: self.flows[place].fields(end) for place, end in ends.items()}

    def rest(self, number: int) -> tuple[Field, ...]:
        """What of a choice was not judged yet, at the end."""
        choice = self.choices()[number]
        if not self.passes:
            return choice.fields
        # A tool's call is whole only now: its arguments are read as what they mean.
        calls = tuple(field for field in choice.fields if field.name == "tool_call")
        flow = self.flows[number]
        return (*flow.fields(flow.position), *calls)

    # --- What is sent ---------------------------------------------------------------------------
    def release(self, choices: Iterable[int]) -> None:
        """These may go to their end."""
        self.released |= dict.fromkeys(choices, WHOLE)

    def flushed(self) -> bytes:
        """The events that may go now; they count as sent."""
        out = []
        dropped = frozenset(self.dropped)
        for waiting in self._held.ready(self.released, dropped):
            self.reader.sent(waiting.event)
            self.begun |= {place for place, position in waiting.needs.items() if position > 0}
            mixed = waiting.choices & dropped
            out.append(self.reader.without(waiting.event, dropped) if mixed else waiting.raw)
        if not self.is_full:
            self._room.set()
        return b"".join(out)

    def ended(self) -> bytes:
        """The end of the stream: the upstream's own where the client got all of it."""
        out = []
        if not self.dropped and self.answer is not None:
            for waiting in self._held.rest():
                self.reader.sent(waiting.event)
                out.append(waiting.raw)
        return b"".join(out) or self.reader.end()

    def said(self) -> Mapping[str, object] | None:
        """The answer that the client has got, as JSON; None where that is not to be kept."""
        if self.dropped or self.answer is None:
            return self.reader.kept()
        return self.answer.body


def _unjudgeable(error: BadRequest) -> UpstreamMalformed:
    return UpstreamMalformed(f"the upstream's answer cannot be judged: {error.message}")
