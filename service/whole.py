"""Drives the gate over an answer that is judged whole."""

from __future__ import annotations

import asyncio
from collections import deque

from service import tracing
from service.errors import UpstreamError, UpstreamMalformed
from service.examiner import Examiner
from service.exchange import Answer, Exchange
from service.gate import (
    Command,
    DeadlinePassed,
    End,
    Event,
    Generate,
    Generated,
    Judge,
    Refuse,
    Release,
    ResponseJudged,
)
from service.replies import NotOurs, Progress, completion_tokens, parse_answer
from service.retries import asked
from service.upstream import UpstreamResponse


class WholeExchange:
    """One exchange, from its first judgement to its last."""

    def __init__(self, examiner: Examiner, progress: Progress) -> None:
        self._examiner = examiner
        self._policy = examiner.policy
        self._progress = progress
        self._exchange = progress.exchange
        self._dialect = progress.dialect
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + self._policy.regenerate.deadline_seconds

    async def run(self) -> End:
        """Carries out the gate's commands until it says that the exchange is over."""
        progress = self._progress
        commands: deque[Command] = deque(progress.gate.start())
        while True:
            match commands.popleft():
                case Judge("prompt"):
                    event: Event = await self._examiner.prompt(self._exchange, progress)
                case Judge(_, choices):
                    event = await self._judge_response(choices)
                case Generate() as command:
                    event = await self._generate(command)
                case Release(choices):
                    progress.released = choices
                    continue
                case Refuse(choices):
                    progress.refused = choices
                    continue
                case End() as end:
                    return end
            commands.extend(progress.gate.feed(event))

    async def _judge_response(self, choices: tuple[int, ...]) -> ResponseJudged | DeadlinePassed:
        progress = self._progress
        attempt = len(progress.answers)
        fields = {number: progress.choices[number].fields for number in choices}
        judging = self._examiner.response(self._exchange, attempt, fields, progress)
        if attempt == 1:
            # The first answer has the guard's own deadline; later ones the policy's beside it.
            return ResponseJudged(await judging)
        try:
            async with asyncio.timeout_at(self._deadline):
                return ResponseJudged(await judging)
        except TimeoutError:
            return DeadlinePassed()

    async def _generate(self, command: Generate) -> Generated | DeadlinePassed:
        progress, dialect = self._progress, self._dialect
        attempt = asked(dialect, self._exchange, progress.incoming.raw, command)
        numbers = attempt.choices
        ask = self._ask(attempt.exchange, attempt.body)
        if command.attempt == 1:
            response, answer = await ask
            numbers = tuple(choice.index for choice in answer.choices)
        else:
            try:
                async with asyncio.timeout_at(self._deadline):
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

    async def _ask(self, exchange: Exchange, body: bytes) -> tuple[UpstreamResponse, Answer]:
        progress = self._progress
        tracer = self._examiner.tracer
        with tracer.span(tracing.UPSTREAM, upstream_said(progress, len(progress.answers) + 1)):
            headers = tracer.onward(progress.incoming.headers)
            response = await progress.route.post(self._dialect.path, body, headers)
        progress.ledger.called_upstream(response.seconds)
        if response.status >= 400:
            raise NotOurs(response)
        if response.status != 200:
            raise UpstreamMalformed(
                f"the upstream answered with status {response.status}, where an answer has 200"
            )
        passes = self._policy.unscannable == "allow"
        try:
            answer = parse_answer(self._dialect, exchange, response)
        except UpstreamMalformed:
            if not passes or progress.answers:
                raise
            answer = Answer((), {}, unscannable=("",))
        self._examiner.admit_answer(answer.unscannable)
        return response, answer


def upstream_said(progress: Progress, attempt: int) -> dict[str, tracing.Value]:
    """What the span of an upstream's call says."""
    return {
        tracing.UPSTREAM_NAME: progress.route.name,
        tracing.MODEL: progress.exchange.model,
        tracing.ATTEMPT: attempt,
    }
