"""Streams of ``/v1/completions``: chunks to a whole answer, and the reverse.

Reference: OpenAI API, "The completion object".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from service import chat_stream
from service.chunk_reader import ChunkReader
from service.chunks import ENDS, Found, Whole, joined, later
from service.errors import UpstreamMalformed
from service.exchange import Annotations, Answer, Exchange

_TAKEN: Final = ("text", "prompt_logprobs", "prompt_token_ids")
"""The text, and what a choice repeats of its prompt, which was judged."""


def whole(events: Sequence[str]) -> dict[str, Any]:
    """The answer that all events of a stream add up to, as if it had not been streamed."""
    return Whole.of(events, _add)


def chunks(body: Mapping[str, Any], shows_usage: bool) -> Iterator[Mapping[str, Any]]:
    """One chunk for each choice; then usage and verdicts, where they were asked for."""
    shared = {key: body.get(key) for key in ("id", "object", "created", "model")}
    if "prompt_filter_results" in body:
        results = body["prompt_filter_results"]
        yield shared | {"choices": [], "prompt_filter_results": results}
    for choice in body["choices"]:
        yield shared | {"choices": [choice]}
    if shows_usage:
        yield shared | {"choices": [], "usage": body.get("usage")}
    if "moderation" in body:
        yield shared | {"choices": [], "moderation": body["moderation"]}


def annotation_chunks(asked: Annotations) -> Iterator[Mapping[str, Any]]:
    """The chunks of a chat's stream, with a choice as it is here."""
    for chunk in chat_stream.annotation_chunks(asked):
        choices = [
            {key: value for key, value in choice.items() if key != "delta"} | {"text": ""}
            for choice in chunk["choices"]
        ]
        yield {**chunk, "object": "text_completion", "choices": choices}


class CompletionsReader(ChunkReader):
    """See ``StreamReader``. ``echoed`` are the texts that choices begin with, under ``echo``."""

    object_name = "text_completion"

    def __init__(
        self,
        exchange: Exchange,
        parse_answer: Callable[[Mapping[str, Any]], Answer],
        echoed: Sequence[str],
    ) -> None:
        super().__init__(exchange, Whole(_add), parse_answer)
        self._echoed = dict(enumerate(echoed))
        self._repeated: dict[int, str] = {}
        """What of ``echoed`` came so far."""

    def _chunks(self, body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        return chunks(body, shows_usage=False)

    def _filtered(self, choice: int) -> Mapping[str, Any]:
        return {"index": choice, "text": "", "logprobs": None, "finish_reason": "content_filter"}

    def _hear_choice(self, item: Mapping[str, Any], found: Found) -> None:
        index, text = item["index"], item.get("text")
        if not isinstance(text, str | None):
            raise UpstreamMalformed("a text in the upstream's stream is none")
        said = self._after_echo(index, text or "", bool(item.get("finish_reason")))
        found.text(index, "text", f"choices[{index}].text", said)
        self._hear_beside(item, _TAKEN, text or "", found)

    def _after_echo(self, index: int, text: str, is_end: bool) -> str:
        """What of ``text`` does not repeat the prompt, which was judged."""
        prompt = self._echoed.get(index)
        if not prompt:
            return text
        repeated = self._repeated.get(index, "") + text
        if len(repeated) < len(prompt) and prompt.startswith(repeated) and not is_end:
            self._repeated[index] = repeated
            return ""
        # It is the prompt with something behind it, or no echo at all.
        del self._echoed[index]
        return repeated.removeprefix(prompt)


def _add(choices: dict[int, dict[str, Any]], item: Mapping[str, Any]) -> None:
    """Adds a chunk's choice to the one that it belongs to."""
    choice = choices.setdefault(item["index"], {"index": item["index"], "text": ""})
    for key, value in item.items():
        add = later if key in ENDS else joined
        choice[key] = add(choice.get(key), value)
