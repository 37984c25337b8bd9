"""Drives the gate: the one place where the guard, the upstream and the policy meet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Final

from models.inputs import GuardInput
from service.errors import (
    Overloaded,
    SluicegateError,
    TooLarge,
    Unscannable,
)
from service.examiner import Examiner
from service.exchange import (
    Dialect,
    Exchange,
    Field,
)
from service.gate import (
    End,
    Gate,
)
from service.headers import response_headers
from service.judgement import FieldJudge
from service.ledger import Bookkeeper, Request
from service.replies import (
    EVENTS,
    Incoming,
    NotOurs,
    Progress,
    Replies,
    Reply,
    completion_tokens,
    prompt_headers,
)
from service.routing import Route, Upstreams
from service.streaming import StreamedExchange
from service.whole import WholeExchange

_MOST_TOKEN_PROMPTS: Final = 64


class Gateway:
    """Guards the upstreams."""

    def __init__(
        self,
        judge: FieldJudge,
        upstreams: Upstreams,
        keeper: Bookkeeper,
        *,
        most_streams: int,
        load: Callable[[], float],
    ) -> None:
        """``load`` is above 1 where the guard is behind with what it has to judge."""
        self._judge = judge
        self._upstreams = upstreams
        self._keeper = keeper
        self._streams = 0
        self._most_streams = most_streams
        self._load = load

    async def handle(self, dialect: Dialect, incoming: Incoming) -> Reply:
        """The reply to a request. Raises ``SluicegateError``."""
        exchange = dialect.parse(incoming.body)
        caller = incoming.caller
        policy = caller.policy
        request = Request(
            id=incoming.id,
            route=incoming.route,
            dialect=dialect.name,
            model=exchange.model,
            policy=policy,
            key_id=caller.key_id,
            subject=incoming.subject,
        )
        ledger = self._keeper.open(request)
        gate = Gate.of(policy, choices=exchange.choices, is_stream=exchange.stream)
        route = self._upstreams.route(exchange.model)
        progress = Progress(dialect, incoming, exchange, gate, ledger, route)
        examiner = Examiner(self._judge, self._keeper, policy)
        replies = Replies(policy.refusal, self._keeper.guard_id)
        try:
            progress.exchange = await self._with_texts(exchange, incoming, route)
            examiner.admit(progress.exchange)
            if exchange.stream:
                return await self._streamed(examiner, replies, progress)
            end = await WholeExchange(examiner, progress).run()
        except NotOurs as refusal:
            progress.outcomes["response"] = "error"
            await ledger.close(progress.outcomes, 1)
            response = refusal.response
            return Reply(response.status, response_headers(response.headers), response.body)
        except SluicegateError as error:
            await self._failed(progress, error)
            raise
        await self._settled(progress, end)
        return replies.reply(progress, end)

    async def _streamed(self, examiner: Examiner, replies: Replies, progress: Progress) -> Reply:
        """A reply whose body is sent as it is released. What fails before its first byte fails
        as any other exchange does; it begins with a sign of life at the latest.
        """
        if self._streams >= self._most_streams:
            raise Overloaded(
                f"{self._most_streams} streams are open, as many as are let in: try again in a"
                " moment"
            )
        run = StreamedExchange(
            examiner,
            progress,
            load=self._load,
            unjudged=self._keeper.metrics.released_before_verdict.inc,
        )
        pieces = run.run()
        self._streams += 1
        try:
            first = await anext(pieces, None)
        except BaseException:
            self._streams -= 1
            await pieces.aclose()
            raise
        if run.end is not None and not run.has_begun:
            self._streams -= 1
            await self._settled(progress, run.end)
            return replies.reply(progress, run.end)
        assert first is not None
        body = self._rest(replies, progress, run, first, pieces)
        # One that has begun cleans up behind itself, also where nobody reads it.
        await anext(body)
        return Reply(200, (EVENTS, *prompt_headers(progress)), b"", stream=body)

    async def _rest(
        self,
        replies: Replies,
        progress: Progress,
        run: StreamedExchange,
        first: bytes,
        pieces: AsyncGenerator[bytes, None],
    ) -> AsyncGenerator[bytes, None]:
        """Nothing, then the bytes of a stream from ``first`` on; its record is durable before the
        last.
        """
        is_settled = False
        try:
            yield b""
            piece: bytes | None = first
            while piece is not None and run.end is None:
                yield piece
                piece = await anext(pieces, None)
            assert run.end is not None
            await self._settled(progress, run.end)
            is_settled = True
            said = run.said()
            keep = progress.incoming.keep
            if keep is not None and said is not None:
                await keep(said)
            if run.has_begun:
                yield replies.tail(progress, piece or b"")
            else:
                yield replies.reply(progress, run.end).body
        except SluicegateError as error:
            is_settled = True
            await self._failed(progress, error)
            yield progress.dialect.error_event(error, progress.incoming.id)
        finally:
            self._streams -= 1
            await pieces.aclose()
            if not is_settled:
                # The client went away.
                await asyncio.shield(self._failed(progress, None))

    async def _settled(self, progress: Progress, end: End) -> None:
        """Counts and records an exchange that came to its end."""
        if end.rounds:
            self._keeper.metrics.rounds.labels(end.rounds).inc()
        progress.outcomes["response" if end.attempts else "prompt"] = end.outcome
        self._account(progress)
        await progress.ledger.close(progress.outcomes, end.attempts)

    async def _failed(self, progress: Progress, error: SluicegateError | None) -> None:
        """Counts and records one that did not; without an error its client went away."""
        if isinstance(error, Unscannable):
            progress.outcomes["prompt"] = "blocked"
            await progress.ledger.close(progress.outcomes, 0)
            return
        progress.outcomes["response" if "prompt" in progress.outcomes else "prompt"] = "error"
        await progress.ledger.close(progress.outcomes, len(progress.answers))

    async def _with_texts(self, exchange: Exchange, incoming: Incoming, route: Route) -> Exchange:
        """The exchange with the texts of its token ids, as the upstream's tokenizer gives them."""
        if not exchange.token_prompts:
            return exchange
        if len(exchange.token_prompts) > _MOST_TOKEN_PROMPTS:
            raise TooLarge(
                f"over {_MOST_TOKEN_PROMPTS} prompts of token ids in one request: send fewer, or"
                " send texts",
                code="too_many_inputs",
            )
        texts: dict[str, str] = dict(exchange.texts or {})
        unscannable = list(exchange.unscannable)
        for prompt in exchange.token_prompts:
            text = await route.detokenize(exchange.model, prompt.ids, incoming.headers)
            if text is None:
                unscannable.append(prompt.path)
            else:
                texts[prompt.path] = text
        read = [
            Field("message", prompt.path, GuardInput("prompt", texts[prompt.path]))
            for prompt in exchange.token_prompts
            if texts.get(prompt.path)
        ]
        return replace(
            exchange,
            fields=(*exchange.fields, *read),
            unscannable=tuple(unscannable),
            texts=texts,
        )

    def _account(self, progress: Progress) -> None:
        """Tokens: what the client got, and what was generated for nothing."""
        if not progress.answers:
            return
        kept = {progress.attempt_of[number] for number in progress.released}
        ledger = progress.ledger
        ledger.response_tokens = 0
        for attempt, (_, answer) in enumerate(progress.answers, 1):
            tokens = completion_tokens(answer)
            if attempt in kept:
                ledger.response_tokens += tokens
            else:
                ledger.wasted_tokens += tokens
        ledger.prompt_tokens = progress.answers[0][1].prompt_tokens or None
