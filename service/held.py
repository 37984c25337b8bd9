"""Events of a stream that wait for what they say to be cleared. Pure."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from service.exchange import Heard
from service.flow import Flow
from service.gate import WHOLE
from service.sse import Event, encode, is_one_line

_IS_PLAIN: Final = re.compile(rb"(?:(?:data|event):[^\r\n]*(?:\r\n?|\n)|\r\n?|\n)*").fullmatch
"""Events of nothing but a type and data: a comment or an id in one would pass unjudged."""


class Waiting(NamedTuple):
    """An event, and up to where each choice that it speaks of must have been released."""

    event: Event
    raw: bytes
    """What goes to the client of it: as it came, but for lines that nobody judged."""
    choices: frozenset[int]
    needs: Mapping[int, int]
    is_after_all: bool
    """Whether it ends the stream, or comes after every choice and so speaks of the whole."""


class Held:
    """The events of one attempt. Of a choice nothing overtakes what came before it; a choice that
    waits holds no other up.
    """

    def __init__(self, choices: frozenset[int]) -> None:
        self._choices = choices
        self._waiting: deque[Waiting] = deque()
        self._open = set(choices)
        self.size = 0
        """Bytes that wait."""

    def add(self, event: Event, heard: Heard, flows: Mapping[int, Flow]) -> None:
        """Takes an event whose texts are in ``flows`` already."""
        self._open -= heard.ends
        needs = {
            choice: WHOLE if choice in heard.ends else flows[choice].position
            for choice in heard.choices
        }
        is_after_all = heard.is_last or not (self._open or heard.ends)
        is_plain = is_one_line(event.raw) or _IS_PLAIN(event.raw)
        raw = event.raw if is_plain else encode(event.data, event.event)
        self._waiting.append(Waiting(event, raw, heard.choices, needs, is_after_all))
        self.size += len(raw)

    def ready(self, released: Mapping[int, int], dropped: frozenset[int]) -> list[Waiting]:
        """Takes out what may go, of choices that were not dropped."""
        ready: list[Waiting] = []
        passed_over: list[Waiting] = []
        blocked: set[int] = set()
        while self._waiting and blocked < self._choices and not self._waiting[0].is_after_all:
            one = self._pop()
            if one.choices and one.choices <= dropped:
                continue
            waits = not blocked.isdisjoint(one.choices) if one.choices else bool(blocked)
            if waits or any(
                released.get(choice, 0) < position and choice not in dropped
                for choice, position in one.needs.items()
            ):
                blocked |= one.choices - dropped
                passed_over.append(one)
            else:
                ready.append(one)
        self._waiting.extendleft(reversed(passed_over))
        self.size += sum(len(one.raw) for one in passed_over)
        return ready

    def rest(self) -> Iterator[Waiting]:
        """Takes out what ends the stream, once all before it is out; nothing where some is not."""
        if all(one.is_after_all for one in self._waiting):
            while self._waiting:
                yield self._pop()

    def _pop(self) -> Waiting:
        first = self._waiting.popleft()
        self.size -= len(first.raw)
        return first
