"""What the chunks of a stream say, and the whole answer that they add up to.

Reference: OpenAI API, "The chat completion chunk object", "The completion object".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from service import extractor
from service.body import parse_object
from service.errors import UpstreamMalformed
from service.exchange import Exchange, FieldName, Said
from service.extractor import Reader, Scan

DONE: Final = "[DONE]"
"""The data of the event that ends a stream."""
HEAD: Final = frozenset(
    {"id", "object", "created", "model", "usage", "system_fingerprint", "service_tier"}
)
"""What every chunk of a stream says again."""
ENDS: Final = frozenset({"index", "finish_reason", "stop_reason"})
"""What a chunk says of a choice once."""
_DEEPEST: Final = 8
NOTHING: Final = object()
"""In place of a value: the key was never there."""


def shows_usage(exchange: Exchange) -> bool:
    """Whether the client asked for a chunk with the usage."""
    options = exchange.body.get("stream_options")
    return isinstance(options, dict) and bool(options.get("include_usage"))


# --- Whole streams -----------------------------------------------------------------------------


def parsed(data: str) -> dict[str, Any]:
    """The chunk in an event's data. Raises ``BadRequest`` for one that is not JSON in one way only,
    ``UpstreamMalformed`` for an error and all else that is no chunk.
    """
    chunk = parse_object(data.encode())
    if not isinstance(chunk.get("choices"), list) or chunk.get("error") is not None:
        raise UpstreamMalformed("an event of the upstream's stream is not a chunk")
    for item in chunk["choices"]:
        if not isinstance(item, dict) or type(item.get("index")) is not int:
            raise UpstreamMalformed("a choice in the upstream's stream has no index")
    return chunk


class Whole:
    """What chunks add up to. ``add_choice`` adds a chunk's choice to those that it is given."""

    def __init__(
        self, add_choice: Callable[[dict[int, dict[str, Any]], Mapping[str, Any]], None]
    ) -> None:
        self._add_choice = add_choice
        self._head: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}

    def add(self, chunk: Mapping[str, Any]) -> None:
        """The next chunk."""
        for key, value in chunk.items():
            if key in HEAD:
                if self._head.get(key, NOTHING) != value:
                    self._head[key] = later(self._head.get(key), value)
            elif key != "choices":
                self._head[key] = joined(self._head.get(key), value)
        for item in chunk["choices"]:
            self._add_choice(self._choices, item)

    def is_around(self, chunk: Mapping[str, Any]) -> bool:
        """Whether ``chunk`` says nothing around its choices that is not kept as it is."""
        return all(
            value is None or key == "choices" or self._head.get(key, NOTHING) == value
            for key, value in chunk.items()
        )

    def add_choice(self, item: Mapping[str, Any]) -> None:
        """A chunk's choice, of a chunk that says the same around it as one before."""
        self._add_choice(self._choices, item)

    def body(self) -> dict[str, Any]:
        """The answer, as if it had not been streamed. Its ``object`` is the chunks'."""
        if not self._choices:
            raise UpstreamMalformed("the upstream's stream ended without an answer")
        return self._head | {"choices": [self._choices[i] for i in sorted(self._choices)]}

    @classmethod
    def of(
        cls,
        events: Sequence[str],
        add_choice: Callable[[dict[int, dict[str, Any]], Mapping[str, Any]], None],
    ) -> dict[str, Any]:
        """The answer in the data of a stream's events, which must end with ``[DONE]``."""
        if not events or events[-1] != DONE:
            raise incomplete()
        whole = cls(add_choice)
        for data in events:
            if data != DONE:
                whole.add(parsed(data))
        return whole.body()


def incomplete() -> UpstreamMalformed:
    """The error of a stream without its end."""
    return UpstreamMalformed("the upstream's stream ended before it was complete: try again")


def joined(old: Any, new: Any) -> Any:
    """A value that comes in parts: texts and lists one behind the other, objects key by key."""
    if isinstance(old, str) and isinstance(new, str):
        return old + new
    if isinstance(old, list) and isinstance(new, list):
        return [*old, *new]
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {key: joined(old.get(key), value) for key, value in new.items()}
    if old is None or new is None or old == new:
        return old if new is None else new
    return [old, new]


def later(old: Any, new: Any) -> Any:
    """What stands under a key that comes again: the later value, or both, so that none of what a
    client reads is lost from what is judged.
    """
    if new is None:
        return old
    return new if old is None or old == new or extractor.are_words(old) else [old, new]


# --- Event by event ----------------------------------------------------------------------------


class Found:
    """What one event says. ``constant`` remembers, over events, what does not change."""

    def __init__(self, constant: dict[tuple[int, str], str | None]) -> None:
        self.said: list[Said] = []
        self.unscannable: list[str] = []
        self._constant = constant

    def text(self, choice: int, name: FieldName, track: str, text: str) -> None:
        """More of a track, blanks too: they part words."""
        if text:
            self.said.append(Said(choice, name, track, text))

    def rest(self, choice: int, values: Mapping[str, Any], path: str) -> None:
        """What stands at ``path`` under keys that nobody knows, each string in a track of its own.

        A text goes on from event to event. An object says the same again and again (verdicts of a
        filter, kinds of parts): of its strings those that never changed yet are said once.
        """
        for key, value in values.items():
            scan = Scan()
            Reader({key: value}, path).rest(scan)
            self.unscannable += scan.unscannable
            track = f"{path}.{key}" if path else key
            if not extractor.are_words(key):
                self._once(choice, path, key)
            if isinstance(value, str):
                self.text(choice, "other", track, value)
            elif scan.pieces:
                self._walk(choice, track, value, 0)

    def _walk(self, choice: int, track: str, value: Any, depth: int) -> None:
        if isinstance(value, str) or depth == _DEEPEST:
            self._once(choice, track, extractor.leaves(value))
        elif isinstance(value, dict):
            self._once(choice, track, "\n".join(value))
            for key, inner in value.items():
                self._walk(choice, f"{track}.{key}", inner, depth + 1)
        elif isinstance(value, list):
            for number, inner in enumerate(value):
                self._walk(choice, f"{track}[{number}]", inner, depth + 1)

    def _once(self, choice: int, track: str, text: str) -> None:
        if not text:
            return
        place = (choice, track)
        if place not in self._constant:
            self._constant[place] = text
        elif self._constant[place] == text:
            return
        else:
            self._constant[place] = None
        self.text(choice, "other", track, text)
