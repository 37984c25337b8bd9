"""The dialect of OpenAI's ``/v1/completions``, as vLLM serves it.

Reference: OpenAI API, "Create completion"; vLLM, ``completion/protocol.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

from models.inputs import GuardInput, Turn
from service import completions_stream, conversation, openai_format
from service.choices_dialect import ChoicesDialect
from service.errors import TooLarge, UpstreamMalformed
from service.exchange import (
    Annotations,
    Answer,
    Choice,
    Exchange,
    Field,
    Refusal,
    Retry,
    StreamReader,
)
from service.extractor import Reader, Scan
from service.prompts import PROMPT_SCHEMA, Prompt, parse_prompts, text_fields, token_prompts

MOST_CHOICES: Final = 4096
"""Prompts times ``n`` of one request."""

_ECHOES: Final = ("prompt_logprobs", "prompt_token_ids")
"""What a choice repeats of its prompt, which was judged."""
_TOKEN_ID: Final = re.compile(r"token_id:\d+")


class CompletionsDialect(ChoicesDialect):
    """See ``Dialect``. Choice ``i`` completes prompt ``i // n``."""

    name = "completions"
    path = "/v1/completions"
    identity_prefix = "cmpl-"
    object_name = "text_completion"
    schema: Mapping[str, Any] = {
        "type": "object",
        "required": ["model"],
        "anyOf": [
            {"required": ["prompt"], "properties": {"prompt": PROMPT_SCHEMA}},
            {
                "required": ["prompt_embeds"],
                "properties": {"prompt_embeds": {"type": ["string", "array"], "minItems": 1}},
            },
        ],
        "properties": {
            "model": {"type": "string", "minLength": 1},
            "prompt": {"anyOf": [*PROMPT_SCHEMA["anyOf"], {"type": "null"}]},
            **openai_format.SHARED_SCHEMA,
        },
    }

    def parse(self, body: Mapping[str, Any]) -> Exchange:
        """See ``Dialect.parse``."""
        reader = Reader(body)
        head = openai_format.head(reader)
        scan = Scan()
        prompts = _prompts(body)
        reader.take("prompt")
        if isinstance(body.get("suffix"), str):
            scan.add("message", "suffix", reader.take("suffix"))
        openai_format.refuse(reader, scan, ("prompt_embeds",))
        reader.pass_words(openai_format.WORDS)
        reader.rest(scan)
        choices = head.choices * (_embedded(body) + len(prompts))
        if choices > MOST_CHOICES:
            raise TooLarge(
                f"prompts times n come to {choices}, over the {MOST_CHOICES} of one request: send"
                " fewer prompts",
                code="too_many_inputs",
            )
        return Exchange(
            model=head.model,
            stream=head.stream,
            choices=choices,
            fields=(*text_fields(prompts), *conversation.prompt_fields(scan.pieces)),
            body=body,
            unscannable=tuple(scan.unscannable),
            token_prompts=token_prompts(prompts),
            moderation=head.moderation,
        )

    def parse_answer(self, exchange: Exchange, body: Mapping[str, Any]) -> Answer:
        """See ``Dialect.parse_answer``. The choices are in the order of their numbers."""
        reader = Reader(body)
        around = Scan()
        texts = _texts(exchange)
        choices: list[Choice] = []
        for position, raw in enumerate(openai_format.choices(reader)):
            index = openai_format.index(raw, position)
            if not isinstance(raw.get("text"), str):
                raise UpstreamMalformed(f"choice {position} of the upstream's answer has no text")
            if not 0 <= index < (len(exchange.asked_again) or exchange.choices):
                raise UpstreamMalformed(f"the upstream's answer has a choice {index} too many")
            scan = Scan()
            fields = _fields(exchange, texts, raw, index, scan)
            around.unscannable += scan.unscannable
            choices.append(Choice(index, fields, raw))
        choices.sort(key=lambda choice: choice.index)
        return openai_format.answer(choices, reader, around, body, ())

    def parse_stream(self, exchange: Exchange, events: list[str]) -> Answer:
        """See ``Dialect.parse_stream``."""
        return self.parse_answer(exchange, completions_stream.whole(events))

    def reader(self, exchange: Exchange) -> StreamReader:
        """See ``Dialect.reader``."""
        texts = _texts(exchange) if exchange.body.get("echo") is True else []
        count = len(exchange.asked_again) or exchange.choices
        echoed = [_prompt_of(exchange, texts, index) for index in range(count)] if texts else ()
        parse = partial(self.parse_answer, exchange)
        return completions_stream.CompletionsReader(exchange, parse, echoed)

    def retried(self, exchange: Exchange, retry: Retry) -> Mapping[str, Any]:
        """See ``Dialect.retried``: the prompts of ``retry.choices``, once for each, and another
        seed. Of one prompt it asks for several choices: vLLM gives prompts of a list the same seed.

        A raw completion has no system message, so that the instruction is not put in. A beam search
        would find the same again, so that a retry samples.
        """
        body = dict(self.forwarded(exchange) or exchange.body)
        body.pop("use_beam_search", None)
        embedded = _embedded(exchange.body)
        numbers = [index // _choices_each(exchange) for index in retry.choices]
        embeds = body.get("prompt_embeds")
        if embedded:
            listed = embeds if isinstance(embeds, list) else [embeds]
            body["prompt_embeds"] = [listed[number] for number in numbers if number < embedded]
        prompts = list(_prompts(exchange.body).values())
        again = [prompts[number - embedded] for number in numbers if number >= embedded]
        if not embedded and len(set(numbers)) == 1:
            return body | {"prompt": again[:1], "seed": retry.seed, "n": len(numbers)}
        return body | {"prompt": again or None, "seed": retry.seed, "n": 1}

    def refused_choice(self, exchange: Exchange, index: int, refusal: Refusal) -> Choice:
        """See ``Dialect.refused_choice``."""
        body = {
            "index": index,
            "text": refusal.text,
            "logprobs": None,
            "finish_reason": refusal.finish_reason,
        }
        return Choice(index, (), body)

    def chunks(self, body: Mapping[str, Any], shows_usage: bool) -> Iterator[Mapping[str, Any]]:
        """See ``ChoicesDialect.chunks``."""
        return completions_stream.chunks(body, shows_usage)

    def annotation_chunks(self, asked: Annotations) -> Iterator[Mapping[str, Any]]:
        """See ``ChoicesDialect.annotation_chunks``."""
        return completions_stream.annotation_chunks(asked)


def _prompts(body: Mapping[str, Any]) -> Mapping[str, Prompt]:
    """The prompts of a request; none where it has embeddings in place of them."""
    value = body.get("prompt")
    if value in (None, []) and _embedded(body):
        return {}
    return parse_prompts(value, "prompt")


def _embedded(body: Mapping[str, Any]) -> int:
    """How many prompts are embeddings. vLLM puts them before the others."""
    embeds = body.get("prompt_embeds")
    return len(embeds) if isinstance(embeds, list) else int(embeds is not None)


def _choices_each(exchange: Exchange) -> int:
    """``n``: choices for each prompt."""
    return int(exchange.body.get("n") or 1)


def _texts(exchange: Exchange) -> list[str]:
    """The text of each prompt; empty where it has none that can be read."""
    read = exchange.texts or {}
    texts = [""] * _embedded(exchange.body)
    for place, prompt in _prompts(exchange.body).items():
        texts.append(prompt if isinstance(prompt, str) else read.get(place, ""))
    return texts


def _prompt_of(exchange: Exchange, texts: Sequence[str], index: int) -> str:
    """What the choice ``index`` of an attempt completes."""
    number = exchange.asked_again[index] if exchange.asked_again else index
    return texts[number // _choices_each(exchange)]


# --- Answers -----------------------------------------------------------------------------------
def _fields(
    exchange: Exchange,
    texts: Sequence[str],
    raw: Mapping[str, Any],
    index: int,
    scan: Scan,
) -> tuple[Field, ...]:
    """All that a choice says, as an answer to its prompt.

    Under ``echo`` its text begins with the prompt, which was judged as such. Tokens beside the text
    say the same, or what a stop string cut off.
    """
    prompt = _prompt_of(exchange, texts, index)
    path = f"choices[{index}]"
    text = raw["text"]
    said = text.removeprefix(prompt) if exchange.body.get("echo") is True else text
    scan.add("text", f"{path}.text", said)
    beside = _tokens(raw.get("logprobs")).replace(text, "", 1)
    scan.add("other", f"{path}.logprobs.tokens", beside)
    openai_format.rest_of_choice(raw, ("text", *_ECHOES), path, scan)
    context = (Turn("user", prompt),) if prompt else ()
    return tuple(
        Field(piece.name, piece.path, GuardInput("response", piece.text, context))
        for piece in scan.pieces
    )


def _tokens(logprobs: Any) -> str:
    """The tokens that an answer lists, in a row."""
    tokens = logprobs.get("tokens") if isinstance(logprobs, dict) else None
    if not isinstance(tokens, list):
        return ""
    return "".join(
        token for token in tokens if isinstance(token, str) and not _TOKEN_ID.fullmatch(token)
    )
