"""What OpenAI's dialects whose answers are lists of choices share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from service import openai_format, sse
from service.body import dumps
from service.chunks import shows_usage
from service.errors import SluicegateError
from service.exchange import Annotations, Answer, Choice, Exchange, Refusal, StreamReader


class ChoicesDialect(ABC):
    """The half of ``Dialect`` that does not depend on what a choice holds."""

    identity_prefix: ClassVar[str]
    """Before the id of an answer of our own."""
    object_name: ClassVar[str]
    """``object`` of an answer that is not a stream."""
    keep_alive = sse.comment("waiting")
    """See ``Dialect.keep_alive``."""

    @abstractmethod
    def reader(self, exchange: Exchange) -> StreamReader:
        """See ``Dialect.reader``."""

    @abstractmethod
    def refused_choice(self, exchange: Exchange, index: int, refusal: Refusal) -> Choice:
        """See ``Dialect.refused_choice``."""

    @abstractmethod
    def chunks(self, body: Mapping[str, Any], shows_usage: bool) -> Iterator[Mapping[str, Any]]:
        """A whole answer as the chunks of a stream."""

    @abstractmethod
    def annotation_chunks(self, asked: Annotations) -> Iterator[Mapping[str, Any]]:
        """Verdicts as chunks without text."""

    def forwarded(self, exchange: Exchange) -> Mapping[str, Any] | None:
        """See ``Dialect.forwarded``: only ``moderation``, which is for us, is taken out."""
        return openai_format.without_moderation(exchange.body)

    def refused(self, exchange: Exchange, identity: str, created: int, refusal: Refusal) -> Answer:
        """See ``Dialect.refused``."""
        choices = tuple(
            self.refused_choice(exchange, index, refusal) for index in range(exchange.choices)
        )
        body = {
            "id": f"{self.identity_prefix}{identity}",
            "object": self.object_name,
            "created": created,
            "model": exchange.model,
            "choices": [choice.body for choice in choices],
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        }
        return Answer(choices, body)

    def renumbered(self, choice: Choice, index: int) -> Choice:
        """See ``Dialect.renumbered``."""
        return openai_format.renumbered(choice, index)

    def assembled(self, answer: Answer, choices: tuple[Choice, ...]) -> Mapping[str, Any]:
        """See ``Dialect.assembled``."""
        return openai_format.around(answer.body) | {"choices": [choice.body for choice in choices]}

    def annotated(self, body: Mapping[str, Any], asked: Annotations) -> Mapping[str, Any]:
        """See ``Dialect.annotated``."""
        return openai_format.annotated(body, asked)

    def annotated_stream(self, raw: bytes, asked: Annotations) -> bytes:
        """See ``Dialect.annotated_stream``: chunks before the end, without text."""
        events = [sse.encode(dumps(chunk)) for chunk in self.annotation_chunks(asked)]
        return raw.removesuffix(sse.DONE) + b"".join((*events, sse.DONE))

    def streamed(self, exchange: Exchange, body: Mapping[str, Any]) -> bytes:
        """See ``Dialect.streamed``."""
        chunks = self.chunks(body, shows_usage(exchange))
        events = (sse.encode(dumps(chunk)) for chunk in chunks)
        return b"".join((*events, sse.DONE))

    def error_event(self, error: SluicegateError, identity: str) -> bytes:
        """See ``Dialect.error_event``."""
        return sse.encode(dumps(self.error(error, identity))) + sse.DONE

    def error(self, error: SluicegateError, identity: str) -> Mapping[str, Any]:
        """See ``Dialect.error``."""
        return error.body()
