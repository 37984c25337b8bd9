"""Drives the gate: the one place where the guard, the upstream and the policy meet."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Final

from models.inputs import GuardInput
from service.errors import (
    Overloaded,
    SluicegateError,
    TooLarge,
    Unscannable,
    UpstreamError,
    UpstreamMalformed,
)
from service.examiner import Examiner
from service.exchange import (
    Answer,
    Dialect,
    Exchange,
    Field,
)
from service.gate import (
    Command,
    DeadlinePassed,
    End,
    Event,
    Gate,
    Generate,
    Generated,
    Judge,
    Refuse,
    Release,
    ResponseJudged,
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
    parse_answer,
    prompt_headers,
)
from service.retries import asked
from service.routing import Route, Upstreams
from service.streaming import StreamedExchange
from service.upstream import UpstreamResponse

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
        self._examiner = Examiner(judge, keeper)
        self._policy = judge.policy
        self._upstreams = upstreams
        self._keeper = keeper
        self._replies = Replies(judge.policy.refusal, keeper.guard_id)
        self._streams = 0
        self._most_streams = most_streams
        self._load = load

    async def handle(self, dialect: Dialect, incoming: Incoming) -> Reply:
        """The reply to a request. Raises ``SluicegateError``."""
        exchange = dialect.parse(incoming.body)
        route = self._upstreams.route(exchange.model)
        request = Request(incoming.id, incoming.route, dialect.name, exchange.model)
        ledger = self._keeper.open(request)
        gate = Gate.of(self._policy, choices=exchange.choices, is_stream=exchange.stream)
        progress = Progress(gate, ledger, route)
        try:
            exchange = await self._with_texts(exchange, incoming, route)
            self._examiner.admit(exchange)
            if exchange.stream:
                return await self._streamed(dialect, incoming, exchange, progress)
            end = await self._drive(dialect, incoming, exchange, progress)
        except NotOurs as refusal:
            progress.outcomes["response"] = "error"
            await ledger.close(progress.outcomes, 1)
            response = refusal.response
            return Reply(response.status, response_headers(response.headers), response.body)
        except SluicegateError as error:
            await self._failed(progress, error)
            raise
        await self._settled(progress, end)
        return self._replies.reply(dialect, incoming, exchange, progress, end)

    async def _streamed(
        self, dialect: Dialect, incoming: Incoming, exchange: Exchange, progress: Progress
    ) -> Reply:
        """A reply whose body is sent as it is released. What fails before its first byte fails
        as any other exchange does; it begins with a sign of life at the latest.
        """
        if self._streams >= self._most_streams:
            raise Overloaded(
                f"{self._most_streams} streams are open, as many as are let in: try again in a"
                " moment"
            )
        run = StreamedExchange(
            self._examiner,
            dialect,
            incoming,
            exchange,
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
            return self._replies.reply(dialect, incoming, exchange, progress, run.end)
        assert first is not None
        body = self._rest(dialect, incoming, exchange, progress, run, first, pieces)
        # One that has begun cleans up behind itself, also where nobody reads it.
        await anext(body)
        return Reply(200, (EVENTS, *prompt_headers(progress)), b"", stream=body)

    async def _rest(
        self,
        dialect: Dialect,
        incoming: Incoming,
        exchange: Exchange,
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
            if incoming.keep is not None and said is not None:
                await incoming.keep(said)
            if run.has_begun:
                yield self._replies.tail(dialect, incoming, exchange, progress, piece or b"")
            else:
                yield self._replies.reply(dialect, incoming, exchange, progress, run.end).body
        except SluicegateError as error:
            is_settled = True
            await self._failed(progress, error)
            yield dialect.error_event(error, incoming.id)
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

    async def _drive(
        self, dialect: Dialect, incoming: Incoming, exchange: Exchange, progress: Progress
    ) -> End:
        """Carries out the gate's commands until it says that the exchange is over."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._policy.regenerate.deadline_seconds
        commands: deque[Command] = deque(progress.gate.start())
        while True:
            match commands.popleft():
                case Judge("prompt"):
                    event: Event = await self._examiner.prompt(exchange, progress)
                case Judge(_, choices):
                    event = await self._judge_response(exchange, progress, choices, deadline)
                case Generate() as command:
                    event = await self._generate(
                        dialect, incoming, exchange, progress, command, deadline
                    )
                case Release(choices):
                    progress.released = choices
                    continue
                case Refuse(choices):
                    progress.refused = choices
                    continue
                case End() as end:
                    return end
            commands.extend(progress.gate.feed(event))

    async def _judge_response(
        self, exchange: Exchange, progress: Progress, choices: tuple[int, ...], deadline: float
    ) -> ResponseJudged | DeadlinePassed:
        attempt = len(progress.answers)
        fields = {number: progress.choices[number].fields for number in choices}
        judging = self._examiner.response(exchange, attempt, fields, progress)
        if attempt == 1:
            # The first answer has the guard's own deadline; later ones the policy's beside it.
            return ResponseJudged(await judging)
        try:
            async with asyncio.timeout_at(deadline):
                return ResponseJudged(await judging)
        except TimeoutError:
            return DeadlinePassed()

    async def _generate(
        self,
        dialect: Dialect,
        incoming: Incoming,
        exchange: Exchange,
        progress: Progress,
        command: Generate,
        deadline: float,
    ) -> Generated | DeadlinePassed:
        attempt = asked(dialect, exchange, incoming.raw, command)
        numbers = attempt.choices
        ask = self._ask(dialect, incoming, attempt.exchange, progress, attempt.body)
        if command.attempt == 1:
            response, answer = await ask
            numbers = tuple(choice.index for choice in answer.choices)
        else:
            try:
                async with asyncio.timeout_at(deadline):
                    response, answer = await ask
            except (TimeoutError, UpstreamError, NotOurs):
                # What was generated so far stays refused: that is an answer, an error is not.
                return DeadlinePassed()
            if len(answer.choices) < len(numbers):
                return DeadlinePassed()
        progress.answers.append((response, answer))
        for number, choice in zip(numbers, answer.choices, strict=False):
            if command.attempt > 1:
                choice = dialect.renumbered(choice, number)
            progress.choices[number] = choice
            progress.attempt_of[number] = command.attempt
        return Generated(numbers, completion_tokens(answer), bool(answer.unscannable))

    async def _ask(
        self,
        dialect: Dialect,
        incoming: Incoming,
        exchange: Exchange,
        progress: Progress,
        body: bytes,
    ) -> tuple[UpstreamResponse, Answer]:
        response = await progress.route.post(dialect.path, body, incoming.headers)
        progress.ledger.called_upstream(response.seconds)
        if response.status >= 400:
            raise NotOurs(response)
        if response.status != 200:
            raise UpstreamMalformed(
                f"the upstream answered with status {response.status}, where an answer has 200"
            )
        passes = self._policy.unscannable == "allow"
        try:
            answer = parse_answer(dialect, exchange, response)
        except UpstreamMalformed:
            if not passes or progress.answers:
                raise
            answer = Answer((), {}, unscannable=("",))
        self._examiner.admit_answer(answer.unscannable)
        return response, answer

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
