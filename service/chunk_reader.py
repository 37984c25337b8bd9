"""Reads streams of chunks with choices event by event, and can end them at will.

Reference: OpenAI API, "The chat completion chunk object", "The completion object".
"""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final

from service import extractor, openai_format, sse
from service.body import dumps
from service.chunks import DONE, ENDS, HEAD, NOTHING, Found, Whole, incomplete, parsed, shows_usage
from service.errors import UpstreamMalformed
from service.exchange import Answer, Choice, Exchange, Heard, Said
from service.plain_chunks import PlainChunk
from service.sse import Event

_CHOICE_WORDS: Final = frozenset({"finish_reason", "stop_reason"})
_CHOICE_NUMBERS: Final = frozenset({"token_ids", "routed_experts"})
_ENTRY_KEYS: Final = frozenset({"token", "bytes", "logprob", "top_logprobs"})
_TOKEN_ID: Final = re.compile(r"token_id:\d+")
_NO_TEXT: Final = "\ufffd"
"""Stands in a token for a part of a character."""
_MOST_MISSES: Final = 4


class ChunkReader(ABC):
    """See ``StreamReader``: the half that does not depend on what a choice holds.

    What stands around the choices of a chunk is judged with the first of them, or with choice 0.
    ``parse`` is the dialect's, for a whole answer.
    """

    object_name: ClassVar[str]
    echoes: ClassVar[frozenset[str]] = frozenset()
    """Keys of a chunk that repeat the prompt, which was judged."""

    def __init__(
        self, exchange: Exchange, whole: Whole, parse: Callable[[dict[str, Any]], Answer]
    ) -> None:
        self._count = len(exchange.asked_again) or exchange.choices
        self._shows_usage = shows_usage(exchange)
        self._whole = whole
        self._parse = parse
        self._constant: dict[tuple[int, str], str | None] = {}
        self._around: dict[tuple[int, str], Any] = {}
        """What a choice's chunks said last around it."""
        self._passed: dict[str, Any] = {}
        """Words that the chunks said last of themselves."""
        self._decoders: dict[int, codecs.IncrementalDecoder] = {}
        self._begun: set[int] = set()
        self._ended: set[int] = set()
        self._is_done = False
        self._plain: PlainChunk | None = None
        self._misses = 0
        """Chunks that were not like the one before, though that was plain."""
        self._usage: Mapping[str, Any] | None = None
        self._usage_event: Event | None = None
        # Of what was sent.
        self._head = {"id": "", "object": self.object_name, "created": 0, "model": exchange.model}
        self._named: set[str] = set()
        self._is_named = False
        self._usage_was_sent = False
        self._end_was_sent = False

    @abstractmethod
    def _hear_choice(self, item: Mapping[str, Any], found: Found) -> None:
        """What a chunk's choice says."""

    @abstractmethod
    def _chunks(self, body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """A whole answer as chunks."""

    @abstractmethod
    def _filtered(self, choice: int) -> Mapping[str, Any]:
        """The last chunk's choice where it was cut."""

    def hear(self, event: Event) -> Heard:
        """See ``StreamReader.hear``."""
        if self._plain is not None:
            text = self._plain.text(event)
            if text:
                said = self._plain.said
                self._whole.add_choice({"index": said.choice, "delta": {"content": text}})
                return Heard((Said(said.choice, said.name, said.track, text),), self._plain.choices)
            self._plain = None
            self._misses += 1
        if event.event == "error" or not extractor.are_words(event.event):
            raise UpstreamMalformed("an event of the upstream's stream is not a chunk")
        if not event.data:
            return Heard()
        if self._is_done:
            raise UpstreamMalformed("the upstream's stream went on after its end")
        if event.data == DONE:
            if not self._begun:
                raise UpstreamMalformed("the upstream's stream ended without an answer")
            self._is_done = True
            return Heard(is_last=True)
        chunk = parsed(event.data)
        items = chunk["choices"]
        for item in items:
            if not 0 <= item["index"] < self._count:
                raise UpstreamMalformed("the upstream's stream has a choice too many")
        self._whole.add(chunk)
        found = Found(self._constant)
        for item in items:
            index, before = item["index"], len(found.said) + len(found.unscannable)
            self._hear_choice(item, found)
            says_more = len(found.said) + len(found.unscannable) > before
            if index in self._ended and says_more:
                raise UpstreamMalformed("a choice in the upstream's stream went on after its end")
            self._begun.add(index)
            if item.get("finish_reason"):
                self._ended.add(index)
        self._hear_around(chunk, found)
        usage = chunk.get("usage")
        if usage and isinstance(usage, dict) and extractor.are_words(usage):
            self._usage = usage
            if not items:
                self._usage_event = event
        heard = Heard(
            tuple(found.said),
            frozenset([_first(items), *(item["index"] for item in items)]),
            frozenset(item["index"] for item in items if item.get("finish_reason")),
            tuple(found.unscannable),
        )
        if self._misses < _MOST_MISSES and self._whole.is_around(chunk):
            self._plain = PlainChunk.of(event, chunk, heard)
        return heard

    def answer(self) -> Answer:
        """See ``StreamReader.answer``."""
        if not self._is_done:
            raise incomplete()
        return self._parse(self._whole.body())

    def without(self, event: Event, choices: frozenset[int]) -> bytes:
        """See ``StreamReader.without``. What stands around the choices goes with the first."""
        if not event.data or event.data == DONE:
            return event.raw
        chunk = parsed(event.data)
        items = chunk["choices"]
        left = [item for item in items if item["index"] not in choices]
        if _first(items) not in choices:
            shown = chunk
        else:
            shown = openai_format.around(chunk)
            if not left and (items or not shown.get("usage")):
                return b""
        if not left and items:
            return b""
        if len(left) == len(items) and shown is chunk:
            return event.raw
        return sse.encode(dumps(shown | {"choices": left}), event.event)

    def sent(self, event: Event) -> None:
        """See ``StreamReader.sent``."""
        if event.data == DONE:
            self._end_was_sent = True
        elif event == self._usage_event:
            self._usage_was_sent = True
        elif event.data and not self._is_named:
            chunk = parsed(event.data)
            # The first chunks of some say nothing of all this yet.
            for key, value in openai_format.around(chunk).items():
                if key in self._head and key not in self._named and value:
                    self._head[key] = value
                    self._named.add(key)
            self._is_named = bool(chunk["choices"])

    def cut(self, choice: int) -> bytes:
        """See ``StreamReader.cut``."""
        return self._encoded([self._filtered(choice)])

    def spoken(self, choice: Choice) -> bytes:
        """See ``StreamReader.spoken``."""
        chunks = self._chunks({"choices": [choice.body]})
        return b"".join(sse.encode(dumps({**chunk, **self._head})) for chunk in chunks)

    def kept(self) -> Mapping[str, Any] | None:
        """See ``StreamReader.kept``."""
        return None

    def end(self) -> bytes:
        """See ``StreamReader.end``."""
        if self._end_was_sent:
            return b""
        self._end_was_sent = True
        if not self._shows_usage or self._usage is None or self._usage_was_sent:
            return sse.DONE
        return self._encoded([], usage=self._usage) + sse.DONE

    def _encoded(self, choices: list[Mapping[str, Any]], **more: Any) -> bytes:
        return sse.encode(dumps({**self._head, "choices": choices, **more}))

    def _hear_around(self, chunk: Mapping[str, Any], found: Found) -> None:
        first = _first(chunk["choices"])
        left = {}
        for key, value in chunk.items():
            if key == "choices" or key in self.echoes:
                continue
            if key in HEAD:
                if self._passed.get(key, NOTHING) == value:
                    continue
                if extractor.are_words(value):
                    self._passed[key] = value
                    continue
            # Chunks say the same around each piece. A choice may be dropped, with what it said.
            if self._around.get((first, key)) == value and value is not None:
                continue
            self._around[first, key] = value
            left[key] = value
        if left:
            found.rest(first, left, "")

    def _hear_beside(
        self, item: Mapping[str, Any], taken: Iterable[str], text: str, found: Found
    ) -> None:
        """What a choice says beside ``text``, which is all that the chunk says of it."""
        index = item["index"]
        path = f"choices[{index}]"
        left = {}
        for key, value in item.items():
            if key == "index" or key in taken or (value is None and key in ("logprobs", *ENDS)):
                continue
            if key == "logprobs":
                self._hear_tokens(index, value, text, found)
            elif key in _CHOICE_WORDS:
                if not extractor.are_words(value):
                    left[key] = value
            elif key not in _CHOICE_NUMBERS or extractor.leaves(value):
                left[key] = value
        if left:
            found.rest(index, left, path)

    def _hear_tokens(self, index: int, logprobs: Any, text: str, found: Found) -> None:
        """What tokens say that ``text`` does not: such as it holds back, or leaves out at its end.

        Alternatives are passed over: nobody chose them.
        """
        path = f"choices[{index}].logprobs"
        if not isinstance(logprobs, dict):
            found.rest(index, {"logprobs": logprobs}, f"choices[{index}]")
            return
        listed = _Listed()
        left = {}
        for key, value in logprobs.items():
            if key in ("content", "refusal", "tokens") and isinstance(value, list):
                for number, entry in enumerate(value):
                    found.rest(index, listed.add(entry), f"{path}.{key}[{number}]")
            elif key != "top_logprobs":
                left[key] = value
        found.rest(index, left, path)
        own = text.replace(_NO_TEXT, "")
        tokens = "".join(listed.tokens).replace(_NO_TEXT, "")
        if tokens not in own:
            beside = tokens.replace(own, "", 1)
            found.text(index, "other", f"{path}.tokens", beside)
        if listed.bytes:
            # A character's bytes may come in several events; its text comes with the last.
            decoder = self._decoders.setdefault(
                index, codecs.getincrementaldecoder("utf-8")("ignore")
            )
            spelled = decoder.decode(bytes(listed.bytes))
            if spelled not in own and spelled != tokens:
                found.text(index, "other", f"{path}.bytes", spelled.replace(own, "", 1))


class _Listed:
    """The tokens that a chunk lists, and their bytes."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.bytes = bytearray()

    def add(self, entry: Any) -> Mapping[str, Any]:
        """Takes an entry of a list; what is left of it."""
        if isinstance(entry, str):
            self._add_token(entry)
            return {}
        if not isinstance(entry, dict):
            return {"token": entry}
        left = {key: value for key, value in entry.items() if key not in _ENTRY_KEYS}
        token, spelled = entry.get("token"), entry.get("bytes")
        if isinstance(token, str):
            self._add_token(token)
            if token and _TOKEN_ID.fullmatch(token):
                spelled = _no_token_id(spelled)
        elif token is not None:
            left["token"] = token
        if isinstance(spelled, list) and all(type(n) is int and 0 <= n < 256 for n in spelled):
            self.bytes += bytes(spelled)
        elif spelled is not None:
            left["bytes"] = spelled
        if not isinstance(entry.get("logprob"), float | int | None):
            left["logprob"] = entry["logprob"]
        return left

    def _add_token(self, token: str) -> None:
        if not _TOKEN_ID.fullmatch(token):
            self.tokens.append(token)


def _no_token_id(spelled: Any) -> Any:
    """The bytes of a token, unless they spell its number."""
    if isinstance(spelled, list) and all(type(n) is int and 0 <= n < 128 for n in spelled):
        return None if _TOKEN_ID.fullmatch(bytes(spelled).decode()) else spelled
    return spelled


def _first(items: Sequence[Mapping[str, Any]]) -> int:
    """The choice that what stands around ``items`` belongs to."""
    return int(items[0]["index"]) if items else 0
