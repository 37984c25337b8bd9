"""What is judged covers what is forwarded and what is released: one property over all dialects.

A body of each dialect is changed at random: sentences and words are planted at every string, as
keys, under keys that are known elsewhere or nowhere, in lists, and in a stream over several deltas.
Each of them that the upstream or the client would get must stand in a text that is judged, or
below a path that is named as unscannable.
"""

import contextlib
import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from service import sse
from service.chat import ChatDialect
from service.completions import CompletionsDialect
from service.embeddings import EmbeddingsDialect
from service.errors import BadRequest, UpstreamMalformed
from service.exchange import Answer, Dialect, Refusal
from service.messages import MessagesDialect
from service.responses import ResponsesDialect

PLANT = re.compile(r"plant \d+ zq|plant\d+zq")
REFUSAL = Refusal("No.", "stop")

# Where a word, which has no blank, may pass: no value of these keys reaches a model as text. The
# model's name alone may hold blanks: it says who answers.
IDENTIFIERS = frozenset(
    {
        "model", "moderation", "id", "type", "role", "index", "object", "status", "phase",
        "call_id", "tool_call_id", "tool_use_id", "signature", "cache_control", "stream_options",
        "user", "tool_choice", "function_call", "service_tier", "modalities", "store", "metadata",
        "safety_identifier", "prompt_cache_key", "reasoning_effort", "verbosity", "stop",
        "request_id", "cache_salt", "logit_bias", "session_id", "include", "truncation",
        "truncation_side", "stop_token_ids", "allowed_token_ids", "logprob_token_ids",
        "response_format", "mm_payload", "encoding_format", "embed_dtype", "endianness", "padding",
        "text", "thinking", "reasoning", "background", "prompt_cache_retention", "created",
        "prompt_cache_options", "stop_sequences", "inference_geo", "effort", "media_type",
        "finish_reason", "stop_reason", "stop_sequence", "system_fingerprint", "usage", "metrics",
        "incomplete_details", "previous_response_id", "item_id", "obfuscation", "event_id",
    }
)  # fmt: skip
# In an answer: tokens of the text that is judged, what repeats the prompt, and vectors.
REPEATED = frozenset(
    {
        "logprobs", "top_logprobs", "token_ids", "routed_experts", "bytes", "prompt_logprobs",
        "prompt_text", "prompt_token_ids", "data",
    }
)  # fmt: skip
# What decides how a body is read: changed rarely, as most changes are refused.
STRUCTURE = frozenset({"role", "type", "model", "object", "status", "media_type"})
# Beside those of the bodies below: keys that mean something in one place or another.
KEYS = (
    "audio", "images", "name", "title", "citations", "chat_template", "chat_template_kwargs",
    "kv_transfer_params", "prompt_embeds", "guided_regex", "structured_outputs", "suffix",
    "echo", "logprobs", "token_ids", "prompt_token_ids", "encrypted_content", "annotations",
    "source", "file_id", "container", "mcp_servers", "prompt", "conversation", "response_format",
    "cache_control", "signature", "stop", "metadata", "user", "tool_choice", "thinking", "usage",
    "id", "error", "moderation", "custom", "stop_details", "of_tomorrow", "x_new",
)  # fmt: skip

CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "send", "arguments": '{"to": "ann"}'},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "send",
        "description": "Sends.",
        "parameters": {"type": "object", "properties": {"to": {"type": "string"}}},
    },
}
SHARED = {"model": "m", "user": "u", "metadata": {"a": "b"}, "stop": ["x"], "top_k": 3}
CHAT = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "q"}, "r"]},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "hm"},
        {"role": "tool", "content": "t", "tool_call_id": "c1"},
        {"role": "assistant", "content": "a", "refusal": "no", "function_call": {"name": "f"}},
        {"role": "user", "content": "w"},
    ],
    "tools": [TOOL],
    "functions": [TOOL["function"]],
    "documents": [{"title": "t", "text": "d"}],
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
    **SHARED,
}
BLOCKS: list[Any] = [
    {"type": "text", "text": "q", "cache_control": {"type": "ephemeral"}},
    {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "r"}]},
    {"type": "document", "title": "t", "source": {"type": "text", "data": "d"}},
    {"type": "search_result", "title": "t", "content": [{"type": "text", "text": "r"}]},
]
SAID: list[Any] = [
    {"type": "thinking", "thinking": "hm", "signature": "AAAA"},
    {"type": "text", "text": "a"},
    {"type": "tool_use", "id": "c1", "name": "send", "input": {"to": "ann"}},
]
MESSAGES = {
    "max_tokens": 9,
    "system": [{"type": "text", "text": "s"}],
    "messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": SAID},
        {"role": "user", "content": BLOCKS},
    ],
    "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}],
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {}}},
    "stop_sequences": ["x"],
    "tool_choice": {"type": "auto"},
    **SHARED,
}
ITEMS: list[Any] = [
    {
        "id": "r1",
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": "hm"}],
        "content": [{"type": "reasoning_text", "text": "hm"}],
    },
    {
        "id": "m1",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [
            {"type": "output_text", "text": "a", "annotations": [], "logprobs": []},
            {"type": "refusal", "refusal": "no"},
        ],
    },
    {"type": "function_call", "id": "f1", "call_id": "c1", "name": "f", "arguments": '{"a":"b"}'},
    {"type": "custom_tool_call", "id": "f2", "call_id": "c2", "name": "f", "input": "go"},
    {"type": "web_search_call", "id": "w1", "status": "completed", "action": {"query": "q"}},
]
RESPONSES = {
    "instructions": "i",
    "input": [
        {"role": "user", "content": "q"},
        *ITEMS,
        {"type": "function_call_output", "call_id": "c1", "output": "o"},
        {"role": "user", "content": [{"type": "input_text", "text": "w"}]},
    ],
    "tools": [{"type": "function", "name": "f", "description": "d", "parameters": {}}],
    "text": {"format": {"type": "text"}},
    "reasoning": {"effort": "low"},
    **SHARED,
}
REQUESTS: list[tuple[Dialect, dict[str, Any]]] = [
    (ChatDialect(), CHAT),
    (CompletionsDialect(), {"prompt": ["q", "w"], "suffix": "s", **SHARED}),
    (ResponsesDialect(), RESPONSES),
    (MessagesDialect(), MESSAGES),
    (EmbeddingsDialect(), {"input": ["q", "w"], **SHARED}),
    (EmbeddingsDialect(), {"messages": CHAT["messages"], "tools": [TOOL], **SHARED}),
]
ANSWERED = {"id": "x1", "object": "o", "created": 1, "model": "m", "usage": {"prompt_tokens": 3}}
COMPLETED = {"index": 0, "text": "a", "logprobs": None, "finish_reason": "stop"}
MESSAGE = {
    "role": "assistant",
    "content": "a",
    "refusal": "no",
    "reasoning": "hm",
    "tool_calls": [CALL],
}
RESPONSE = {
    "id": "x1",
    "object": "response",
    "created_at": 1,
    "model": "m",
    "status": "completed",
    "output": ITEMS,
    "instructions": "i",
    "metadata": {"a": "b"},
    "tools": RESPONSES["tools"],
    "usage": {"input_tokens": 3, "output_tokens": 2},
}
ANSWERS: list[tuple[Dialect, dict[str, Any], dict[str, Any]]] = [
    (
        ChatDialect(),
        {"messages": [{"role": "user", "content": "q"}], "n": 2, **SHARED},
        {
            "choices": [
                {"index": 0, "message": MESSAGE, "finish_reason": "stop"},
                {"index": 1, "message": {"role": "assistant", "content": "b"}},
            ],
            **ANSWERED,
        },
    ),
    (
        CompletionsDialect(),
        {"prompt": "q", "n": 2, "echo": True, **SHARED},
        {"choices": [COMPLETED, {**COMPLETED, "index": 1, "text": "qb"}], **ANSWERED},
    ),
    (ResponsesDialect(), RESPONSES, RESPONSE),
    (
        MessagesDialect(),
        {"max_tokens": 9, "messages": [{"role": "user", "content": "q"}], **SHARED},
        {
            "id": "x1",
            "type": "message",
            "role": "assistant",
            "model": "m",
            "content": SAID,
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": 3, "output_tokens": 2},
        },
    ),
]
VECTORS = {"object": "list", "data": [{"index": 0, "embedding": [0.5]}], "model": "m", "id": "x1"}


def nodes(value: Any) -> Iterator[Any]:
    """All objects and lists in a JSON value."""
    if isinstance(value, dict | list):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from nodes(item)


KNOWN = sorted(
    {
        key
        for part in (*(two[1] for two in REQUESTS), *(three[2] for three in ANSWERS))
        for node in nodes(part)
        if isinstance(node, dict)
        for key in node
    }
    | {*KEYS}
)


@dataclass
class Planter:
    """Changes JSON in place. ``cut`` are the sentences that come in pieces."""

    draw: Callable[..., Any]
    count: int = 0
    cut: list[str] = field(default_factory=list)

    def number(self, below: int) -> int:
        return int(self.draw(st.integers(0, below - 1)))

    def sentence(self) -> str:
        self.count += 1
        return f"plant {self.count} zq"

    def text(self) -> str:
        self.count += 1
        return f"plant{self.count}zq" if self.number(3) == 0 else f"plant {self.count} zq"

    def value(self, depth: int = 2) -> Any:
        kind = self.number(6 if depth else 3)
        if kind < 3:
            return self.text()
        if kind == 3:
            return [self.value(depth - 1) for _ in range(self.number(3))]
        if kind == 4:
            return {"type": self.draw(st.sampled_from(["text", "image", "new"])), "text": "x"} | {
                KNOWN[self.number(len(KNOWN))]: self.value(depth - 1)
            }
        return {self.sentence(): 1, "a": self.value(depth - 1)}

    def arguments(self) -> str:
        """JSON in a string; its escapes may hide what it says."""
        raw = json.dumps({self.text(): self.value(1), "b": self.text()})
        return raw.replace("plant", "\\u0070lant") if self.number(2) else raw

    def leaf(self, key: Any) -> str:
        return self.arguments() if key == "arguments" else self.text()

    def change(self, root: Any) -> None:
        """One change somewhere in ``root``."""
        found = list(nodes(root))
        node = found[self.number(len(found))]
        kind = self.number(5)
        if isinstance(node, list):
            node.append(self.value())
        elif kind == 0:
            node[self.sentence()] = self.draw(st.sampled_from([None, 1, "x"]))
        elif kind <= 2:
            node.setdefault(KNOWN[self.number(len(KNOWN))], self.value())
        else:
            keys = [key for key in node if key not in STRUCTURE or self.number(8) == 0]
            if keys:
                key = keys[self.number(len(keys))]
                is_text = isinstance(node[key], str | None)
                node[key] = self.leaf(key) if is_text or self.number(4) == 0 else node[key]

    def changed(self, root: Any) -> Any:
        root = copy.deepcopy(root)
        for _ in range(1 + self.number(5)):
            self.change(root)
        return root

    def cut_in(self, events: list[Any], place: tuple[int, tuple[Any, ...], str]) -> None:
        """Says a sentence at a place of a stream in several events, each like the first."""
        number, path, key = place
        said = self.sentence()
        self.cut.append(said)
        if key == "partial_json":
            said = json.dumps({"a": said}).replace("p", "\\u0070")
        at = 1 + self.number(len(said) - 1)
        whole = events.pop(number)
        first = copy.deepcopy(whole)
        inner = first
        for step in path:
            inner = inner[step]
        inner[key] = said[:at]
        events[number:number] = [first, only(whole, path, {key: said[at:]})]


def only(value: Any, path: tuple[Any, ...], said: dict[str, str]) -> Any:
    """``value`` with what says where it belongs, and ``said`` at ``path``."""
    if isinstance(value, list):
        return [only(value[path[0]], path[1:], said)]
    kept = {key: value[key] for key in value if key in STRUCTURE or "index" in key or "id" in key}
    return kept | ({path[0]: only(value[path[0]], path[1:], said)} if path else said)


def places(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """What was planted in a JSON value, and the path of each."""
    if isinstance(value, str):
        said = value
        if path.endswith("arguments"):
            with contextlib.suppress(ValueError):
                said = json.dumps(json.loads(value))
        yield from ((path, found) for found in PLANT.findall(said))
    elif isinstance(value, dict):
        for key, item in value.items():
            inner = f"{path}.{key}" if path else key
            yield from ((inner, found) for found in PLANT.findall(key))
            yield from places(item, inner)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from places(item, f"{path}[{number}]")


def keys_of(path: str) -> set[str]:
    return {part.partition("[")[0] for part in path.split(".")}


def unread(value: Any, texts: str, paths: tuple[str, ...]) -> list[tuple[str, str]]:
    """What of the planted in ``value`` is in no text, nor below one of ``paths``."""
    return [
        (path, said)
        for path, said in places(value)
        if said not in texts
        and not any(path == one or path.startswith((f"{one}.", f"{one}[")) for one in paths)
        and not (path == "model" or (" " not in said and keys_of(path) & IDENTIFIERS))
    ]


def texts_of(answer: Answer) -> str:
    return "\n".join(one.judged.text for choice in answer.choices for one in choice.fields)


def missed(value: Any, texts: str, paths: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """Of an answer; an upstream may add words of its own to the tools that it repeats."""
    return [
        (path, said)
        for path, said in unread(value, texts, paths)
        if not (keys_of(path) & REPEATED or (" " not in said and "tools" in keys_of(path)))
    ]


def named(case: tuple[Any, ...]) -> str:
    return str(case[0].name)


@pytest.mark.parametrize("case", REQUESTS, ids=named)
class TestRequests:
    def test_a_body_with_a_sentence_at_every_string_is_read_whole(
        self, case: tuple[Dialect, dict[str, Any]]
    ) -> None:
        dialect, body = case
        body = planted_everywhere(body)
        exchange = dialect.parse(body)
        assert len(list(places(body))) > 2
        assert exchange.unscannable == ()
        assert unread(body, "\n".join(one.judged.text for one in exchange.fields), ()) == []

    @settings(max_examples=40, deadline=None)
    @given(data=st.data())
    def test_all_that_is_forwarded_is_judged_or_named(
        self, case: tuple[Dialect, dict[str, Any]], data: st.DataObject
    ) -> None:
        dialect, template = case
        body = Planter(data.draw).changed(template)
        try:
            exchange = dialect.parse(body)
        except BadRequest:
            event("refused")
            return
        event("read")
        texts = "\n".join(one.judged.text for one in exchange.fields)
        assert unread(dialect.forwarded(exchange) or body, texts, exchange.unscannable) == []


def planted_everywhere(template: Any) -> Any:
    body = copy.deepcopy(template)
    count = 0
    for node in nodes(body):
        for key, item in list(node.items() if isinstance(node, dict) else enumerate(node)):
            if isinstance(item, str) and key not in STRUCTURE:
                count += 1
                node[key] = f"plant {count} zq"
    return body


@pytest.mark.parametrize("case", ANSWERS, ids=named)
class TestAnswers:
    @settings(max_examples=40, deadline=None)
    @given(data=st.data())
    def test_all_that_is_released_is_judged_or_named(
        self, case: tuple[Dialect, dict[str, Any], dict[str, Any]], data: st.DataObject
    ) -> None:
        dialect, request, template = case
        exchange = dialect.parse(request)
        body = Planter(data.draw).changed(template)
        try:
            answer = dialect.parse_answer(exchange, body)
        except (BadRequest, UpstreamMalformed):
            event("refused")
            return
        event("read")
        assert missed(body, texts_of(answer), answer.unscannable) == []
        refused = [dialect.refused_choice(exchange, one.index, REFUSAL) for one in answer.choices]
        if refused:
            assert missed(dialect.assembled(answer, tuple(refused)), "") == []

    @settings(max_examples=40, deadline=None)
    @given(data=st.data())
    def test_all_that_a_stream_says_is_judged_or_named(
        self, case: tuple[Dialect, dict[str, Any], dict[str, Any]], data: st.DataObject
    ) -> None:
        dialect, request, template = case
        exchange = dialect.parse({**request, "stream": True})
        planter = Planter(data.draw)
        events = events_of(dialect.streamed(exchange, template))
        for _ in range(planter.number(4)):
            planter.change(events[planter.number(len(events))])
        if cuttable := list(cuts(dialect.name, events)):
            planter.cut_in(events, cuttable[planter.number(len(cuttable))])
        try:
            raw = [json.dumps(one) for one in events]
            done = ["[DONE]"] if dialect.name in ("chat", "completions") else []
            answer = dialect.parse_stream(exchange, [*raw, *done])
        except (BadRequest, UpstreamMalformed):
            event("refused")
            return
        event("read")
        if answer.unscannable:
            return
        texts = texts_of(answer)
        assert [found for one in events for found in missed(one, texts)] == []
        assert [said for said in planter.cut if said not in texts] == []
        refused = [dialect.refused_choice(exchange, one.index, REFUSAL) for one in answer.choices]
        assert missed(dialect.assembled(answer, tuple(refused)), "") == []


def events_of(stream: bytes) -> list[Any]:
    parser = sse.EventParser()
    data = [one.data for one in (*parser.feed(stream), *parser.finish()) if one.data]
    return [json.loads(one) for one in data if one != "[DONE]"]


def cuts(dialect: str, events: list[Any]) -> Iterator[tuple[int, tuple[Any, ...], str]]:
    """Where a client joins texts: the event, the path of an object in it, and the key."""
    for number, one in enumerate(events):
        if dialect == "responses":
            if isinstance(one.get("delta"), str):
                yield number, (), "delta"
        elif dialect == "messages":
            delta = one.get("delta")
            if one["type"] == "content_block_delta" and isinstance(delta, dict):
                kind = str(delta.get("type")).removesuffix("_delta")
                if kind in ("text", "thinking", "input_json"):
                    yield number, ("delta",), "partial_json" if kind == "input_json" else kind
                yield number, ("delta",), "x_cut"
        else:
            for place, choice in enumerate(one["choices"]):
                if isinstance(choice, dict):
                    yield from ((number, *cut) for cut in _cuts_of_choice(place, choice))


def _cuts_of_choice(place: int, choice: Mapping[str, Any]) -> Iterator[tuple[tuple[Any, ...], str]]:
    yield ("choices", place), "x_cut"
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        yield ("choices", place), "text"
        return
    yield from ((("choices", place, "delta"), key) for key in ("content", "reasoning", "x_cut"))
    calls = delta.get("tool_calls")
    for number, call in enumerate(calls if isinstance(calls, list) else ()):
        inner = ("choices", place, "delta", "tool_calls", number)
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            yield inner, "x_cut"
            yield (*inner, "function"), "x_cut"
            yield (*inner, "function"), "arguments"


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_nothing_but_vectors_is_released_beside_vectors(data: st.DataObject) -> None:
    dialect = EmbeddingsDialect()
    body = Planter(data.draw).changed(VECTORS)
    answer = dialect.parse_answer(dialect.parse({"input": "q", **SHARED}), body)
    beside = {key: value for key, value in body.items() if key != "data"}
    assert answer.unscannable or missed(beside, "") == []
