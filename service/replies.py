"""What the client gets of an exchange: the upstream's bytes, or an answer of our own making."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from service import sse, verdict_shapes
from service.body import dumps, parse_object
from service.caller import Caller
from service.errors import BadRequest, ContentFiltered, UpstreamMalformed
from service.exchange import Annotations, Answer, Choice, Dialect, Direction, Exchange, Refusal
from service.gate import End, Gate, Outcome
from service.headers import Headers, header, response_headers
from service.ledger import Ledger
from service.policy import Decision, RefusalText, strongest
from service.routing import Route
from service.upstream import UpstreamResponse

_JSON: Final = ("content-type", "application/json")
EVENTS: Final = ("content-type", "text/event-stream; charset=utf-8")


@dataclass(frozen=True, slots=True)
class Incoming:
    """A client's request: its raw bytes, their JSON, and the headers that may go upstream."""

    id: str
    route: str
    raw: bytes
    body: Mapping[str, Any]
    headers: Mapping[str, str]
    caller: Caller
    subject: str | None = None
    """A keyed hash of whom the client names as its user."""
    wants_azure: bool = False
    """Whether Azure's filter results are asked for."""
    keep: Callable[[Mapping[str, Any]], Awaitable[None]] | None = None
    """Told what a stream said, if the client got all of it, before its last bytes."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the client gets.

    ``said`` is the answer as JSON, or None where it is an error; ``attempts`` is how often the
    upstream was asked.
    """

    status: int
    headers: Headers
    body: bytes
    said: Mapping[str, Any] | None = None
    attempts: int = 0
    stream: AsyncGenerator[bytes, None] | None = None
    """In place of ``body``: what is sent as it is released."""


@dataclass(slots=True)
class Progress:
    """What is known of an exchange on its way."""

    dialect: Dialect
    incoming: Incoming
    exchange: Exchange
    gate: Gate
    ledger: Ledger
    route: Route
    prompt: Decision | None = None
    decisions: dict[int, Decision | None] = field(default_factory=dict)
    """On each choice of its newest attempt, what prevails over all that was judged of it."""
    decided: dict[int, int] = field(default_factory=dict)
    """The attempt of each of these."""
    answers: list[tuple[UpstreamResponse, Answer]] = field(default_factory=list)
    choices: dict[int, Choice] = field(default_factory=dict)
    """The newest of each number."""
    attempt_of: dict[int, int] = field(default_factory=dict)
    """The attempt that each choice comes from."""
    released: tuple[int, ...] = ()
    refused: tuple[int, ...] | None = ()
    outcomes: dict[Direction, Outcome] = field(default_factory=dict)

    def decide(self, attempt: int, decisions: Mapping[int, Decision | None]) -> None:
        """Notes decisions on choices, or on pieces of them."""
        for number, decision in decisions.items():
            earlier = self.decisions.get(number) if self.decided.get(number) == attempt else None
            known = [one for one in (earlier, decision) if one is not None]
            self.decisions[number] = strongest(known) if known else None
            self.decided[number] = attempt


class NotOurs(Exception):
    """The upstream refused the first attempt: its answer goes to the client as it is."""

    def __init__(self, response: UpstreamResponse) -> None:
        super().__init__()
        self.response = response


class Replies:
    """Renders the end of an exchange; ``refusal`` is the policy's."""

    def __init__(self, refusal: RefusalText, guard_id: str) -> None:
        self._refusal = Refusal(refusal.text, refusal.finish_reason)
        self._is_error = refusal.status == 400
        self._guard_id = guard_id

    def reply(self, progress: Progress, end: End) -> Reply:
        """The reply to an exchange that is over."""
        dialect, exchange = progress.dialect, progress.exchange
        said = _headers(progress, end)
        asked = self._annotations(progress)
        if not end.attempts:
            return self._blocked(progress, asked, said)
        response, first = progress.answers[0]
        headers = (*response_headers(response.headers), *said)
        if end.attempts > 1 or progress.refused:
            shown = self._assembled(progress, asked)
            headers = tuple(pair for pair in headers if pair[0] != "content-type")
            return replace(_rendered(dialect, exchange, shown, headers), attempts=end.attempts)
        body, shown = response.body, first.body
        # Without an answer that could be read there is nothing to tell of it.
        if asked is not None and shown:
            shown = dialect.annotated(shown, asked)
            if is_stream(response.headers):
                body = dialect.annotated_stream(body, asked)
            else:
                body = dumps(shown).encode()
        return Reply(response.status, headers, body, shown, end.attempts)

    def tail(self, progress: Progress, last: bytes) -> bytes:
        """The end of a stream, with the verdicts in it that were asked for."""
        asked = self._annotations(progress)
        return last if asked is None else progress.dialect.annotated_stream(last, asked)

    def _assembled(self, progress: Progress, asked: Annotations | None) -> Mapping[str, Any]:
        """The released choices and refusals, under the head of the first attempt and with the
        usage of the last that was released.
        """
        dialect, exchange = progress.dialect, progress.exchange
        _, first = progress.answers[0]
        refused = progress.refused if progress.refused is not None else tuple(progress.choices)
        choices = {number: progress.choices[number] for number in progress.released}
        choices |= {
            number: dialect.refused_choice(exchange, number, self._refusal) for number in refused
        }
        kept = [progress.attempt_of[number] for number in progress.released]
        usage = progress.answers[max(kept, default=1) - 1][1].body.get("usage")
        shown = dialect.assembled(
            replace(first, body={**first.body, "usage": usage}),
            tuple(choices[number] for number in sorted(choices)),
        )
        return shown if asked is None else dialect.annotated(shown, asked)

    def _blocked(self, progress: Progress, asked: Annotations | None, said: Headers) -> Reply:
        """The reply to a prompt that was blocked."""
        dialect, incoming, exchange = progress.dialect, progress.incoming, progress.exchange
        answer = dialect.refused(exchange, incoming.id, int(time.time()), self._refusal)
        if answer is None or self._is_error:
            verdict = progress.prompt.verdict if progress.prompt else None
            results = verdict_shapes.filter_results(verdict, is_filtered=True)
            error = ContentFiltered(self._refusal.text, results)
            body = dumps(dialect.error(error, incoming.id)).encode()
            return Reply(error.status, (_JSON, *said), body)
        shown = dialect.assembled(answer, answer.choices)
        if asked is not None:
            shown = dialect.annotated(shown, asked)
        return _rendered(dialect, exchange, shown, said)

    def _annotations(self, progress: Progress) -> Annotations | None:
        """The verdicts to tell, where the client asked for them."""
        incoming = progress.incoming
        wants_openai = progress.exchange.moderation is not None
        if not wants_openai and not incoming.wants_azure:
            return None
        refused = progress.refused if progress.refused is not None else progress.choices
        return Annotations(
            guard=self._guard_id,
            prompt=progress.prompt.verdict if progress.prompt else None,
            choices={
                number: decision.verdict if decision else None
                for number, decision in progress.decisions.items()
            },
            refused=frozenset(refused),
            openai=wants_openai,
            azure=incoming.wants_azure,
        )


def parse_answer(dialect: Dialect, exchange: Exchange, response: UpstreamResponse) -> Answer:
    """The upstream's answer, streamed or not; ``UpstreamMalformed`` if it cannot be judged."""
    try:
        if is_stream(response.headers):
            # The body has a bound of its own, and an event may hold a whole answer.
            parser = sse.EventParser(max_event_bytes=len(response.body) + 1)
            events = [event.data for event in (*parser.feed(response.body), *parser.finish())]
            return dialect.parse_stream(exchange, [data for data in events if data])
        return dialect.parse_answer(exchange, parse_object(response.body))
    except BadRequest as error:
        raise UpstreamMalformed(
            f"the upstream's answer cannot be judged: {error.message}"
        ) from None


def completion_tokens(answer: Answer) -> int:
    """As the upstream counts, or a quarter of the characters where it does not say."""
    if answer.completion_tokens:
        return answer.completion_tokens
    return sum(len(f.judged.text) for choice in answer.choices for f in choice.fields) // 4


def _rendered(
    dialect: Dialect, exchange: Exchange, shown: Mapping[str, Any], headers: Headers
) -> Reply:
    """An answer of our own making, in a stream where that was asked for."""
    if exchange.stream:
        return Reply(200, (*headers, EVENTS), dialect.streamed(exchange, shown), shown)
    return Reply(200, (*headers, _JSON), dumps(shown).encode(), shown)


def prompt_headers(progress: Progress) -> Headers:
    """What a stream can say of its judgement when it begins."""
    if progress.prompt is None:
        return ()
    return (("x-sluicegate-prompt-severity", progress.prompt.verdict.level.label),)


def _headers(progress: Progress, end: End) -> Headers:
    """What every answer says of its judgement."""
    said = [
        ("x-sluicegate-outcome", end.outcome),
        ("x-sluicegate-attempts", str(end.attempts)),
        *prompt_headers(progress),
    ]
    levels = [one.verdict.level for one in progress.decisions.values() if one is not None]
    if levels:
        said.append(("x-sluicegate-response-severity", max(levels).label))
    return tuple(said)


def is_stream(headers: Headers) -> bool:
    """Whether an answer is a stream of events."""
    kind = (header(headers, "content-type") or "").partition(";")[0]
    return kind.strip().lower() == "text/event-stream"
