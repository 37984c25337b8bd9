"""Reads a stream of ``/v1/responses`` event by event, and can end it before its end.

Reference: OpenAI API, "Responses: streaming events".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from service import extractor
from service.errors import UpstreamMalformed
from service.exchange import Answer, Choice, Exchange, FieldName, Heard, Said
from service.extractor import Reader, Scan
from service.responses_items import parse_item
from service.responses_shown import Shown
from service.responses_stream import (
    CIPHERS,
    DONE,
    FINAL,
    WORDS,
    Adding,
    parse_event,
    texts,
)
from service.sse import Event

_CHOICE: Final = frozenset({0})
_PLACES: Final = frozenset(
    {"sequence_number", "output_index", "content_index", "summary_index", "annotation_index"}
)
_PART_FIELDS: Final[Mapping[str, FieldName]] = {
    "output_text": "text",
    "refusal": "refusal",
    "reasoning_text": "reasoning",
    "summary_text": "reasoning",
}


@dataclass(frozen=True, slots=True)
class _Kind:
    """Where a running text stands: ``key`` of an item, or of a part in a list of an item."""

    name: FieldName
    key: str
    parts: str = ""
    index: str = ""


_KINDS: Final[Mapping[str, _Kind]] = {
    "response.output_text": _Kind("text", "text", "content", "content_index"),
    "response.refusal": _Kind("refusal", "refusal", "content", "content_index"),
    "response.reasoning_text": _Kind("reasoning", "text", "content", "content_index"),
    "response.reasoning_summary_text": _Kind("reasoning", "text", "summary", "summary_index"),
    "response.function_call_arguments": _Kind("tool_call", "arguments"),
    "response.mcp_call_arguments": _Kind("tool_call", "arguments"),
    "response.custom_tool_call_input": _Kind("tool_call", "input"),
    "response.code_interpreter_call_code": _Kind("other", "code"),
}
_RUNNING: Final[Mapping[str, FieldName]] = {
    "arguments": "tool_call",
    "input": "tool_call",
    "code": "other",
}
"""Keys of items whose values stream in."""


class ResponsesReader:
    """See ``StreamReader``. A response is always one choice.

    ``read`` is the dialect's parser of whole answers, which knows what repeats the request; its
    last argument is what stands beside the answer.
    """

    def __init__(
        self, exchange: Exchange, read: Callable[[Exchange, Mapping[str, Any], Scan], Answer]
    ) -> None:
        self._exchange = exchange
        self._read = read
        self._adding = Adding()
        self._told: dict[str, list[str]] = {}
        """What was said, by where it stands."""
        self._said: list[Said] = []
        self._unscannable: list[str] = []
        self._unsent: deque[tuple[Event, Mapping[str, Any]]] = deque()
        self._shown = Shown(exchange)
        self._is_done = False

    # --- Heard -----------------------------------------------------------------------------
    def hear(self, event: Event) -> Heard:
        """See ``StreamReader.hear``."""
        if not event.data:
            return Heard()
        is_over = self._adding.final is not None
        if event.data == DONE:
            if not is_over:
                raise UpstreamMalformed("the upstream's stream ended before it was complete")
            if self._is_done:
                raise UpstreamMalformed("the upstream's stream went on after its end")
            self._is_done = True
            return Heard(choices=_CHOICE, is_last=True)
        value = parse_event(event.data)
        if event.event == "error":
            # Clients take its name for it, whatever it holds.
            raise UpstreamMalformed("the upstream's stream ended with an error: try again")
        self._adding.add(value)
        if is_over:
            raise UpstreamMalformed("the upstream's stream went on after its end")
        self._said, self._unscannable = [], []
        if event.event and event.event != value["type"]:
            self._beside("event", event.event)
        self._hear(value)
        self._unsent.append((event, value))
        is_last = value["type"] in FINAL
        ends = _CHOICE if is_last else frozenset[int]()
        return Heard(tuple(self._said), _CHOICE, ends, tuple(self._unscannable), is_last)

    def answer(self) -> Answer:
        """See ``StreamReader.answer``."""
        streamed = self._adding.total()
        return self._read(self._exchange, streamed.response, streamed.scan())

    def _hear(self, event: Mapping[str, Any]) -> None:
        kind: str = event["type"]
        left = {
            key: value
            for key, value in event.items()
            if (value is not None or not extractor.are_words(key))
            and not (key in _PLACES and isinstance(value, int | float))
        }
        name, _, verb = kind.rpartition(".")
        item_path = f"output[{_number(event, 'output_index')}]"
        if isinstance(left.get("response"), dict):
            self._response(left.pop("response"), is_final=kind in FINAL)
        if isinstance(left.get("item"), dict):
            self._item(left.pop("item"), item_path)
        if isinstance(left.get("part"), dict):
            parts = "summary" if "summary" in kind else "content"
            path = f"{item_path}.{parts}[{_number(event, f'{parts}_index')}]"
            self._part(left.pop("part"), path)
        if "audio" in kind and "transcript" not in kind:
            if left.pop("delta", None) is not None:
                self._unscannable.append(kind)
        elif (known := _KINDS.get(name)) and verb in ("delta", "done"):
            self._running(known, event, left, item_path, is_delta=verb == "delta")
        for key, value in left.items():
            if not (key in WORDS and extractor.are_words(value)):
                index = _number(event, "summary_index" if "summary" in kind else "content_index")
                self._beside(f"{item_path}.{name}[{index}].{key}", value, key)

    def _running(
        self,
        kind: _Kind,
        event: Mapping[str, Any],
        left: dict[str, Any],
        path: str,
        *,
        is_delta: bool,
    ) -> None:
        """Takes a piece of a running text out of ``left``, or the whole of it that ends it."""
        if kind.parts:
            path = f"{path}.{kind.parts}[{_number(event, kind.index)}]"
        track = f"{path}.{kind.key}"
        if kind.name == "tool_call" and isinstance(left.get("name"), str):
            self._whole("tool_call", track, left.pop("name") + "\n", f"{path}.name")
        key = "delta" if is_delta else kind.key
        text = left.get(key)
        if not isinstance(text, str):
            return
        del left[key]
        if is_delta:
            self._say(kind.name, track, text, track)
        else:
            self._whole(kind.name, track, text, track)
        # Numbers of the same tokens.
        if (ids := left.pop("token_ids", None)) is not None and extractor.leaves(ids):
            left["token_ids"] = ids
        self._tokens(left.pop("logprobs", None), text, f"{path}.logprobs")

    def _response(self, response: Mapping[str, Any], *, is_final: bool) -> None:
        """Says what a response adds to what was said; what repeats the request does not."""
        output = response.get("output")
        head = {**response, "output": output if is_final else []}
        if not is_final:
            status = head.get("status")
            if status is not None and not extractor.are_words(status):
                self._beside("status", status)
            head["status"] = "completed"
            if output is not None and not isinstance(output, list):
                self._beside("output", output)
        if isinstance(output, list):
            head["output"] = []
            for number, item in enumerate(output):
                self._item(item, f"output[{number}]")
        answer = self._read(self._exchange, head, Scan())
        self._unscannable += answer.unscannable
        for field in answer.choices[0].fields:
            track = field.path or "response"
            self._whole(field.name, track, field.judged.text, f"{track}.{field.name}")

    def _item(self, item: Any, path: str) -> None:
        """Says of an item what was not said before. What is none is for ``parse_item`` to tell."""
        if isinstance(item, dict):
            item = dict(item)
            kind = item.get("type")
            if kind in ("message", "reasoning"):
                for key in ("content", "summary"):
                    if isinstance(parts := item.get(key), list):
                        item[key] = self._parts(parts, f"{path}.{key}")
            if kind in ("function_call", "custom_tool_call"):
                track = f"{path}.{'input' if kind == 'custom_tool_call' else 'arguments'}"
                for key in ("name", "namespace"):
                    if isinstance(named := item.get(key), str):
                        self._whole("tool_call", track, f"{named}\n", f"{path}.{key}")
                        del item[key]
            for key, name in _RUNNING.items():
                if isinstance(text := item.get(key), str):
                    track = f"{path}.{key}"
                    self._whole(name, track, text, track)
                    del item[key]
        scan = Scan(unscannable=self._unscannable)
        parse_item(item, path, scan, is_answer=True)
        self._scanned(scan)

    def _parts(self, parts: list[Any], path: str) -> list[Any]:
        """Says the parts that are texts, and gives the others."""
        left = []
        for number, part in enumerate(parts):
            if _is_text(part):
                self._part(part, f"{path}[{number}]")
            else:
                left.append(part)
        return left

    def _part(self, part: Mapping[str, Any], path: str) -> None:
        """Says of a part what was not said before."""
        scan = Scan(unscannable=self._unscannable)
        if _is_text(part):
            reader = Reader(part, path)
            kind = reader.take("type")
            key = "refusal" if kind == "refusal" else "text"
            text = reader.take(key)
            self._whole(_PART_FIELDS[kind], f"{path}.{key}", text, f"{path}.{key}")
            self._tokens(reader.take("logprobs"), text, f"{path}.logprobs")
            reader.rest(scan)
        else:
            parse_item({"type": "message", "content": [part]}, path, scan, is_answer=True)
        self._scanned(scan)

    def _tokens(self, logprobs: Any, text: str, track: str) -> None:
        """Says what a list of tokens says and ``text`` does not. Alternatives of a token pass
        where they are one word: they are what the model did not say.
        """
        if not logprobs:
            return
        if not isinstance(logprobs, list):
            self._beside(track, logprobs)
            return
        tokens: list[str] = []
        spelled: list[str] = []
        others: list[str] = []
        for entry in logprobs:
            if not isinstance(entry, dict):
                others += texts(entry, self._unscannable, frozenset())
                continue
            entry = dict(entry)
            alternatives = entry.pop("top_logprobs", None)
            tokens.append(token := _taken(entry, "token", str, ""))
            spelled.append(_spelled(entry, token))
            others += texts(entry, self._unscannable, frozenset())
            for one in alternatives if isinstance(alternatives, list) else [alternatives]:
                if isinstance(one, dict):
                    one = dict(one)
                    token = _taken(one, "token", str, "")
                    words = dict.fromkeys([token, _spelled(one, token)])
                    others += (word for word in words if len(word.split()) > 1 or len(word) > 128)
                others += texts(one, self._unscannable, frozenset())
        for joined in dict.fromkeys(["".join(tokens), "".join(spelled)]):
            more = _more(text, joined)
            if more.strip():
                self._say("other", track, more, track)
        self._others(track, others)

    # --- What is said ------------------------------------------------------------------------
    def _say(self, name: FieldName, track: str, text: str, source: str) -> None:
        if text:
            self._told.setdefault(source, []).append(text)
            self._said.append(Said(0, name, track, text))

    def _whole(self, name: FieldName, track: str, text: str, source: str) -> None:
        """Says of a whole text what was not said before."""
        parts = self._told.setdefault(source, [])
        told = "".join(parts)
        parts[:] = [told]
        if more := _more(told, text):
            is_new = bool(told) and not text.startswith(told)
            self._say(name, track, f"\n{more}" if is_new else more, source)

    def _beside(self, track: str, value: Any, key: str = "") -> None:
        """Says what stands under a key that nobody knows, and the key where it is no word.

        All of it, however often it comes: it may be pieces of a text.
        """
        if not extractor.are_words(key):
            self._say("other", "stream", f"{key}\n", "stream")
        if key in CIPHERS:
            if value is not None:
                self._unscannable.append(key)
        elif isinstance(value, str):
            name: FieldName = "tool_call" if "arguments" in track else "other"
            self._say(name, track, value, track)
        elif key == "delta" and isinstance(value, dict):
            for inner, piece in value.items():
                if not (inner in WORDS and extractor.are_words(piece)):
                    self._beside(f"{track}.{inner}", piece, inner)
        else:
            self._others(track, texts(value, self._unscannable, frozenset()))

    def _others(self, track: str, found: Iterable[str]) -> None:
        self._say("other", track, "\n".join(one for one in found if one.strip()), track)

    def _scanned(self, scan: Scan) -> None:
        for piece in scan.pieces:
            self._whole(piece.name, piece.path, piece.text, f"{piece.path}.{piece.name}")

    # --- Sent --------------------------------------------------------------------------------
    def without(self, event: Event, choices: frozenset[int]) -> bytes:
        """See ``StreamReader.without``."""
        return b"" if event.data and 0 in choices else event.raw

    def sent(self, event: Event) -> None:
        """See ``StreamReader.sent``."""
        if not event.data or event.data == DONE:
            return
        while self._unsent:
            heard, value = self._unsent.popleft()
            if heard == event:
                self._shown.add(value)
                return
        raise AssertionError("an event was sent that was not heard, or out of its order")

    def cut(self, choice: int) -> bytes:
        """See ``StreamReader.cut``."""
        final = self._adding.final
        usage = final.get("usage") if final is not None else None
        # Numbers say nothing; nothing else is shown of what was not sent.
        is_plain = isinstance(usage, dict) and extractor.are_words(usage)
        return self._shown.cut(usage if is_plain else None)

    def spoken(self, choice: Choice) -> bytes:
        """See ``StreamReader.spoken``: a response has one choice."""
        raise AssertionError("a stream of a response has one choice")

    def kept(self) -> Mapping[str, Any] | None:
        """See ``StreamReader.kept``."""
        return self._shown.final

    def end(self) -> bytes:
        """See ``StreamReader.end``."""
        return self.cut(0)


def _number(event: Mapping[str, Any], key: str) -> str:
    """Which of several it is; by its id where it has no number."""
    value = event.get(key)
    if isinstance(value, int):
        return str(value)
    identity = event.get("item_id")
    return identity if isinstance(identity, str) and extractor.are_words(identity) else ""


def _is_text(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _PART_FIELDS:
        return False
    return isinstance(part.get("refusal" if kind == "refusal" else "text"), str)


def _more(told: str, text: str) -> str:
    """What ``text`` says beyond ``told``."""
    if text in told:
        return ""
    return text.removeprefix(told)


def _taken(entry: dict[str, Any], key: str, kind: type[Any], default: Any) -> Any:
    """Takes ``key`` where it is what it should be."""
    return entry.pop(key) if isinstance(entry.get(key), kind) else default


def _spelled(entry: dict[str, Any], token: str) -> str:
    """Takes a token's bytes as text; the token where it has none, or half a character."""
    values: Sequence[Any] = _taken(entry, "bytes", list, [])
    try:
        return bytes(values).decode() if values else token
    except UnicodeDecodeError:
        return bytes(values).decode(errors="ignore") or token
    except (TypeError, ValueError):
        entry["bytes"] = values
        return token
