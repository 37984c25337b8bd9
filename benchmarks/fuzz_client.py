"""A client that holds each piece of a stream against what a guard had cleared by then."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Final

from benchmarks.fuzz_world import MarkerGuard, ScriptedUpstream, Violation
from benchmarks.random_streams import Said
from benchmarks.random_texts import OF_ONE_SYMBOL, Text, flat
from service import sse
from service.exchange import Dialect
from service.extractor import unescaped

_WORD: Final = re.compile(r"[\w.:/@+=-]*", re.ASCII)
_HALF_ESCAPE: Final = re.compile(r"(?<!\\)((?:\\\\)*)\\(?:u[0-9A-Fa-f]{0,3})?\Z")
_Key = tuple[Any, ...]
"""Of a running text: the choice or item that it belongs to, and what it is there."""


class Client:
    """Reads a stream as a client does, and holds each piece against what was cleared by then."""

    def __init__(
        self, dialect: Dialect, upstream: ScriptedUpstream, guard: MarkerGuard, refusal: str
    ) -> None:
        self._dialect = dialect
        self._upstream = upstream
        self._guard = guard
        self._refusal = refusal
        self._parser = sse.EventParser(1 << 24)
        self._seen_cleared = 0
        self._symbols: dict[str, Text] = {}
        self._calls: dict[str, Text] = {}
        self._known = 0
        self._names: dict[_Key, str] = {}
        self.raw: list[bytes] = []
        self.said: list[Said] = []
        self.got: dict[_Key, str] = {}
        """What each running text has come to."""
        self.loose: dict[str, str] = {}
        """What else it was told, by where."""
        self.ends = Counter[str]()
        self.told = ""
        """What an error said."""

    def take(self, raw: bytes) -> None:
        """The next bytes."""
        self.raw.append(raw)
        self._catch_up()
        for event in self._parser.feed(raw):
            if event.data:
                self._event(event)

    def _catch_up(self) -> None:
        scripts = self._upstream.scripts
        for script in scripts[self._known :]:
            self._symbols |= {text.symbol: text for text in script.texts if not text.name}
            self._calls |= {text.name: text for text in script.texts if text.name}
        self._known = len(scripts)
        for judged in self._guard.cleared[self._seen_cleared :]:
            for found in OF_ONE_SYMBOL.finditer(judged):
                if text := self._symbols.get(found[1]):
                    text.clear(found[0])
            for call in self._calls.values():
                if call.symbol in judged or judged in call.flat or judged in call.read:
                    call.clear(judged)
        self._seen_cleared = len(self._guard.cleared)

    def _event(self, event: sse.Event) -> None:
        self.said.append((event.event, event.data))
        if event.data == "[DONE]":
            self.ends["done"] += 1
            return
        value = json.loads(event.data)
        if "error" in value or value.get("type") == "error":
            self.ends["error"] += 1
            self.told = event.data
            return
        read = {"messages": self._messages, "responses": self._responses}
        for key, text in list(read.get(self._dialect.name, self._chunk)(value)):
            self.got[key] = self.got.get(key, "") + text
            self._check(key)
        for path, text in _strings(value, ""):
            self.loose[path] = self.loose.get(path, "") + text
            if not _WORD.fullmatch(text):
                self._check_loose(text)

    def _chunk(self, chunk: dict[str, Any]) -> Iterator[tuple[_Key, str]]:
        for item in chunk["choices"]:
            index = item["index"]
            if item.get("finish_reason"):
                self.ends[f"finish {index}"] += 1
                self.ends["cut"] += item["finish_reason"] == "content_filter"
            own = item.pop("text", None) or ""
            if own:
                yield (index, "text"), own
            delta = item.get("delta") or {}
            content = delta.pop("content", None) or ""
            if isinstance(content, list):
                content = "".join(part["text"] for part in content)
            if content:
                own = content
                yield (index, "content"), content
            for name in ("reasoning", "reasoning_content"):
                if text := delta.pop(name, None):
                    yield (index, name), text
            for call in delta.pop("tool_calls", ()):
                key: _Key = (index, "call", call["index"])
                function = call["function"]
                if name := function.get("name"):
                    self._names[key] = name
                yield key, function.get("arguments") or ""
            logprobs = item.pop("logprobs", None) or {}
            tokens: list[str] = [entry["token"] for entry in logprobs.get("content", ())]
            tokens += logprobs.get("tokens", ())
            if "".join(tokens) not in own:
                self._check_loose("".join(tokens))

    def _messages(self, event: dict[str, Any]) -> Iterator[tuple[_Key, str]]:
        kind, index = event["type"], event.get("index")
        if kind == "message_delta":
            self.ends["cut"] += event["delta"].get("stop_reason") == "refusal"
        elif kind == "message_stop":
            self.ends["last"] += 1
        elif kind == "content_block_start" and event["content_block"].get("name"):
            self._names["call", index] = event["content_block"]["name"]
        elif kind == "content_block_delta":
            delta = event["delta"]
            for key in ("text", "thinking"):
                if text := delta.pop(key, None):
                    yield (key, index), text
            if text := delta.pop("partial_json", None):
                yield ("call", index), text

    def _responses(self, event: dict[str, Any]) -> Iterator[tuple[_Key, str]]:
        kind = event["type"]
        if kind in ("response.completed", "response.incomplete", "response.failed"):
            self.ends["last"] += 1
            self.ends["cut"] += kind == "response.incomplete"
        item = event.get("item") or {}
        if item.get("type") == "function_call":
            self._names["call", event["output_index"]] = item["name"]
        if kind == "response.function_call_arguments.delta":
            yield ("call", event["output_index"]), event.pop("delta")
        elif kind.endswith(".delta"):
            place = (event.get("content_index"), event.get("summary_index"))
            yield (kind, event["output_index"], *place), event.pop("delta")

    def _check(self, key: _Key) -> None:
        """Whether a running text is the beginning of the upstream's, and cleared so far."""
        got = self.got[key]
        if not got:
            return
        name = self._names.get(key)
        text = self._calls.get(name) if name else self._symbols.get(got[0])
        if text is None:
            if not self._refusal.startswith(got):
                raise Violation(f"{key}: nobody said {got[:40]!r}")
            return
        if not text.raw.startswith(got):
            raise Violation(f"{key}: out of order at {len(got)}: {got[-40:]!r}")
        size = text.size(got)
        if size > text.cleared:
            early = size - text.cleared
            raise Violation(
                f"{key}: {early} characters before their verdict, at {text.cleared}", early
            )

    def _check_loose(self, text: str) -> None:
        # A call that was cut may end in half an escape, which means nothing yet.
        told = flat(unescaped(_HALF_ESCAPE.sub(r"\1", text)))
        if not told or told in flat(self._refusal):
            return
        if any(told in one for one in self._guard.cleared):
            return
        texts = [*self._symbols.values(), *self._calls.values()]
        if not any(told in one.flat[: one.cleared] for one in texts):
            early = len(told)
            raise Violation(f"{early} characters before their verdict: {text[:60]!r}", early)

    @property
    def sent(self) -> int:
        """Characters of running texts."""
        return sum(map(len, self.got.values()))

    def finish(self, stops: Iterable[str]) -> None:
        """Holds all of it against the words that the policy stops."""
        raw = b"".join(self.raw)
        texts = [*self.got.values(), *self.loose.values()]
        for stop in stops:
            if stop.encode() in raw or any(stop in unescaped(text) for text in texts):
                raise Violation(f"{stop} was sent")


def _strings(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """All strings in a JSON value, keys of objects too, with where they stand."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        index = value.get("index", "")
        for key, inner in value.items():
            if not _WORD.fullmatch(key):
                yield f"{path}.", key
            yield from _strings(inner, f"{path}.{index}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, path)
