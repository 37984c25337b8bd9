"""Random streams of an upstream, in four dialects: its events, their bytes, and what goes wrong."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from benchmarks.random_texts import SEVERE, Author
from service import sse

Said = tuple[str | None, str]
"""Type and data of an event."""

_FAULTS: Final = (
    "garbage", "an error event", "no end", "two ends", "events after the end", "a stall",
    "broken off", "an event too large", "a status", "no stream",
)  # fmt: skip
_FINISHES: Final = ("stop", "stop", "length")


class Script:
    """What the upstream says in one attempt, drawn at random."""

    def __init__(
        self, draw: random.Random, symbols: Iterator[int], dialect: str, count: int
    ) -> None:
        self._draw = draw
        self._author = Author(draw, symbols)
        self._count = count
        self._is_ascii = draw.random() < 0.3
        self.fault = draw.choice(_FAULTS) if draw.random() < 0.2 else ""
        events = {
            "chat": self._chat,
            "completions": self._completions,
            "messages": self._messages,
            "responses": self._responses,
        }
        self.said: list[Said] = list(events[dialect]())
        self.texts = self._author.texts
        self.status = 200
        self.chunks = self._cut(self._spoilt(self._wire(), dialect))

    def _json(self, value: Mapping[str, Any]) -> str:
        return json.dumps(value, ensure_ascii=self._is_ascii, separators=(",", ":"))

    # --- Dialects ------------------------------------------------------------------------------
    def _chat(self) -> Iterator[Said]:
        draw = self._draw
        reasoning = draw.choice(("reasoning", "reasoning_content"))
        choices: list[list[dict[str, Any]]] = []
        for index in range(self._count):
            deltas: list[dict[str, Any]] = []
            if draw.random() < 0.8:
                deltas.append({"role": "assistant"})
            if draw.random() < 0.2:
                deltas += [{reasoning: piece} for piece in self._author.text()]
            if draw.random() < 0.85:
                is_listed = draw.random() < 0.03
                deltas += [
                    {"content": [{"type": "text", "text": piece}] if is_listed else piece}
                    for piece in self._author.text()
                ]
            for number in range(draw.choice((0, 0, 0, 0, 1, 2))):
                name, pieces = self._author.call()
                function: dict[str, Any] = {"name": name, "arguments": ""}
                head = {"index": number, "id": f"c{number}", "type": "function"}
                deltas.append({"tool_calls": [head | {"function": function}]})
                deltas += [
                    {"tool_calls": [{"index": number, "function": {"arguments": piece}}]}
                    for piece in pieces
                ]
            has_tokens = draw.random() < 0.15
            items = [
                {"index": index, "delta": delta | self._author.extra(), "finish_reason": None}
                | (_tokens(delta.get("content")) if has_tokens else {})
                for delta in deltas
            ]
            items.append({"index": index, "delta": {}, "finish_reason": draw.choice(_FINISHES)})
            choices.append(items)
        yield from self._chunks(choices, "chat.completion.chunk")

    def _completions(self) -> Iterator[Said]:
        choices: list[list[dict[str, Any]]] = []
        for index in range(self._count):
            has_tokens = self._draw.random() < 0.15
            items: list[dict[str, Any]] = [
                {"index": index, "text": piece, "logprobs": None, "finish_reason": None}
                | ({"logprobs": {"tokens": [piece]}} if has_tokens else {})
                | self._author.extra()
                for piece in self._author.text()
            ]
            end = {"index": index, "text": "", "finish_reason": self._draw.choice(_FINISHES)}
            choices.append([*items, end])
        yield from self._chunks(choices, "text_completion")

    def _chunks(self, choices: Sequence[list[dict[str, Any]]], kind: str) -> Iterator[Said]:
        """The choices' items by turns, some together in one chunk, with what stands around."""
        draw = self._draw
        head = {"id": "x1", "object": kind, "created": 1, "model": "m"}
        left = [list(reversed(items)) for items in choices]
        if draw.random() < 0.1:
            yield None, self._json(head | {"choices": []})
        while live := [items for items in left if items]:
            count = len(live) if draw.random() < 0.1 else 1
            items = [one.pop() for one in draw.sample(live, count)]
            yield None, self._json(head | {"choices": items} | self._author.extra())
            if draw.random() < 0.01:
                yield None, self._json(head | {"choices": []} | self._author.extra())
        if draw.random() < 0.5:
            usage = {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}
            yield None, self._json(head | {"choices": [], "usage": usage})
        yield None, "[DONE]"

    def _messages(self) -> Iterator[Said]:
        draw = self._draw
        usage = {"input_tokens": 3, "output_tokens": 1}
        message: dict[str, Any] = {"id": "m1", "type": "message", "role": "assistant", "model": "m"}
        message |= {"content": [], "usage": usage}
        events: list[dict[str, Any]] = [{"type": "message_start", "message": message}]
        kinds = ["thinking"] * (draw.random() < 0.3) + ["text"] * draw.choice((0, 1, 1, 1, 2))
        kinds += ["tool_use"] * draw.choice((0, 0, 0, 1, 2))
        for number, kind in enumerate(kinds):
            start: dict[str, Any] = {"type": kind, kind: ""}
            if kind == "tool_use":
                name, pieces = self._author.call()
                start = {"type": kind, "id": f"t{number}", "name": name, "input": {}}
                deltas = [{"type": "input_json_delta", "partial_json": one} for one in pieces]
            else:
                deltas = [{"type": f"{kind}_delta", kind: one} for one in self._author.text()]
            if kind == "thinking":
                deltas.append({"type": "signature_delta", "signature": "c2ln"})
            place = {"index": number}
            events.append({"type": "content_block_start", **place, "content_block": start})
            events += [
                {"type": "content_block_delta", **place, "delta": one, **self._author.extra()}
                for one in deltas
            ]
            events.append({"type": "content_block_stop", **place})
            if draw.random() < 0.1:
                events.append({"type": "ping"})
            if draw.random() < 0.03:
                events.append({"type": "remark", "remark": self._author.note()})
        end = {"stop_reason": draw.choice(("end_turn", "max_tokens")), "stop_sequence": None}
        events.append({"type": "message_delta", "delta": end, "usage": {"output_tokens": 9}})
        events.append({"type": "message_stop"})
        for event in events:
            yield event["type"], self._json(event)
        if draw.random() < 0.05:
            yield None, "[DONE]"

    def _responses(self) -> Iterator[Said]:
        draw = self._draw
        head = {"id": "r1", "object": "response", "created_at": 1, "model": "m"}
        opening = {**head, "status": "in_progress", "output": []}
        events: list[dict[str, Any]] = [
            {"type": f"response.{kind}", "response": opening} for kind in ("created", "in_progress")
        ]
        output: list[dict[str, Any]] = []
        kinds = ["reasoning"] * (draw.random() < 0.3) + ["message"] * (draw.random() < 0.9)
        kinds += ["function_call"] * draw.choice((0, 0, 0, 1, 2))
        for number, kind in enumerate(kinds):
            item: dict[str, Any] = {"id": f"i{number}", "type": kind, "status": "completed"}
            place = {"item_id": item["id"], "output_index": number}
            inner: list[dict[str, Any]] = []
            if kind == "function_call":
                name, pieces = self._author.call()
                item |= {"call_id": f"c{number}", "name": name, "arguments": "".join(pieces)}
                stem = "response.function_call_arguments"
                inner = [{"type": f"{stem}.delta", "delta": one, **place} for one in pieces]
                inner.append({"type": f"{stem}.done", "arguments": item["arguments"], **place})
                empty = item | {"arguments": "", "status": "in_progress"}
            else:
                key = "content" if kind == "message" or draw.random() < 0.5 else "summary"
                if kind == "message":
                    item["role"] = "assistant"
                else:
                    item["summary"] = []
                parts: list[dict[str, Any]] = []
                item[key] = []
                empty = {**item, key: [], "status": "in_progress"}
                for index in range(draw.choice((1, 1, 1, 2))):
                    where = place | {f"{key}_index": index}
                    inner += self._part(kind, key, where, parts)
                item[key] = parts
            output.append(item)
            at = {"output_index": number}
            events.append({"type": "response.output_item.added", "item": empty, **at})
            events += inner
            events.append({"type": "response.output_item.done", "item": item, **at})
            if draw.random() < 0.03:
                events.append({"type": "response.remark", "remark": self._author.note()})
        usage = {"input_tokens": 3, "output_tokens": 9, "total_tokens": 12}
        final = {**head, "status": "completed", "output": output, "usage": usage}
        events.append({"type": "response.completed", "response": final})
        for number, event in enumerate(events):
            yield event["type"], self._json({**event, "sequence_number": number})
        if draw.random() < 0.05:
            yield None, "[DONE]"

    def _part(
        self, kind: str, key: str, where: Mapping[str, Any], parts: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """The events of a part, which is added to ``parts``."""
        pieces = self._author.text()
        more: dict[str, Any] = {}
        if kind == "message":
            stem, opened, name = "output_text", "content_part", "output_text"
            more = {"logprobs": []}
        elif key == "summary":
            stem, opened, name = "reasoning_summary_text", "reasoning_summary_part", "summary_text"
        else:
            stem, opened, name = "reasoning_text", "content_part", "reasoning_text"
        part: dict[str, Any] = {"type": name, "text": "".join(pieces)}
        if kind == "message":
            part["annotations"] = []
        parts.append(part)
        empty = {**part, "text": ""}
        return [
            {"type": f"response.{opened}.added", "part": empty, **where},
            *(
                {
                    "type": f"response.{stem}.delta",
                    "delta": one,
                    **where,
                    **more,
                    **self._author.extra(),
                }
                for one in pieces
            ),
            {"type": f"response.{stem}.done", "text": part["text"], **where, **more},
            {"type": f"response.{opened}.done", "part": part, **where},
        ]

    # --- Bytes -----------------------------------------------------------------------------------
    def _wire(self) -> list[bytes]:
        """Each event as bytes, in one of the ways that the format allows."""
        draw = self._draw
        end = draw.choice(("\n", "\n", "\n", "\r\n", "\r"))
        colon = draw.choice((": ", ":"))
        is_chatty = draw.random() < 0.2
        out = []
        for kind, data in self.said:
            lines = [f"event{colon}{kind}"] if kind else []
            if is_chatty and draw.random() < 0.2:
                lines.append(draw.choice((f": {SEVERE}", f"id: {SEVERE}", "retry: 9", ":")))
            if is_chatty and draw.random() < 0.1:
                out.append(f": {SEVERE}{end}{end}".encode())
            out.append(end.join((*lines, f"data{colon}{data}", "", "")).encode())
        return out

    def _spoilt(self, wire: list[bytes], dialect: str) -> list[bytes]:
        """``wire`` with a fault in it, if one was drawn."""
        place = self._draw.randrange(len(wire))
        match self.fault:
            case "garbage":
                bad = (b"data: {\n\n", b"data: 7\n\n", b"data: \xff\n\n", b"data: {}{}\n\n")
                wire.insert(place, self._draw.choice(bad))
            case "an error event":
                kind = "error" if dialect in ("messages", "responses") else None
                error = {"type": "error", "error": {"message": f"it failed {SEVERE}"}}
                wire.insert(place, sse.encode(json.dumps(error), kind))
            case "no end":
                del wire[max(1, min(place, len(wire) - 2)) :]
            case "two ends":
                wire += [wire[-1], wire[-1]]
            case "events after the end":
                some = [one for one in wire if b"data" in one and b"ping" not in one]
                wire.append(self._draw.choice(some[:-1]))
            case "an event too large":
                wire.insert(place, b"data: " + b"x" * (1 << 20) + b"\n\n")
            case "a stall" | "broken off":
                del wire[place:]
            case "a status":
                self.status = self._draw.choice((400, 429, 500, 503))
                wire = [b'{"error":{"message":"no"}}']
            case "no stream":
                wire = [b"<html>"]
        return wire

    def _cut(self, wire: list[bytes]) -> list[bytes]:
        """The reads that the bytes come in: by events, or cut anywhere, into hundreds at most."""
        most = self._draw.choice((0, 0, 40, 400, 4000))
        if most == 0 or self.fault == "an event too large":
            return wire
        out, start, raw = [], 0, b"".join(wire)
        most = max(most, len(raw) // 500)
        while start < len(raw):
            size = self._draw.randint(1, most)
            out.append(raw[start : start + size])
            start += size
        return out


def _tokens(content: Any) -> dict[str, Any]:
    """A chat's logprobs for a piece of text."""
    if not content or not isinstance(content, str):
        return {}
    entry = {"token": content, "logprob": -0.1, "bytes": list(content.encode()), "top_logprobs": []}
    return {"logprobs": {"content": [entry]}}
