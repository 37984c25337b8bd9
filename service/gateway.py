"""Drives the gate: the one place where the guard, the upstream and the policy meet."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from models.inputs import GuardInput
from service.body import dumps
from service.errors import (
    GuardUnavailable,
    SluicegateError,
    TooLarge,
    Unscannable,
    UpstreamError,
    UpstreamMalformed,
)
from service.exchange import (
    Answer,
    Dialect,
    Direction,
    Exchange,
    Field,
    Retry,
)
from service.gate import (
    ALL,
    Command,
    DeadlinePassed,
    End,
    Event,
    Gate,
    Generate,
    Generated,
    Judge,
    Outcome,
    PromptJudged,
    Refuse,
    Release,
    ResponseJudged,
)
from service.headers import response_headers
from service.judgement import FieldJudge, Judgement
from service.ledger import Bookkeeper, Request
from service.policy import Action, Decision, tightened
from service.replies import Incoming, Progress, Replies, Reply, completion_tokens, parse_answer
from service.routing import Route, Upstreams
from service.upstream import UpstreamResponse

_SEEDS: Final = 2**31
_MOST_TOKEN_PROMPTS: Final = 64


class _NotOurs(Exception):
    """The upstream refused the first attempt: its answer goes to the client as it is."""

    def __init__(self, response: UpstreamResponse) -> None:
        super().__init__()
        self.response = response


class Gateway:
    """Guards the upstreams."""

    def __init__(self, judge: FieldJudge, upstreams: Upstreams, keeper: Bookkeeper) -> None:
        self._judge = judge
        self._policy = judge.policy
        self._upstreams = upstreams
        self._keeper = keeper
        self._replies = Replies(judge.policy.refusal, keeper.guard_id)

    async def handle(self, dialect: Dialect, incoming: Incoming) -> Reply:
        """The reply to a request. Raises ``SluicegateError``."""
        exchange = dialect.parse(incoming.body)
        route = self._upstreams.route(exchange.model)
        request = Request(incoming.id, incoming.route, dialect.name, exchange.model)
        ledger = self._keeper.open(request)
        progress = Progress(Gate(self._policy.regenerate), ledger, route)
        try:
            exchange = await self._with_texts(exchange, incoming, route)
            end = await self._drive(dialect, incoming, exchange, progress)
        except _NotOurs as refusal:
            progress.outcomes["response"] = "error"
            await ledger.close(progress.outcomes, 1)
            response = refusal.response
            return Reply(response.status, response_headers(response.headers), response.body)
        except Unscannable:
            progress.outcomes["prompt"] = "blocked"
            await ledger.close(progress.outcomes, 0)
            raise
        except SluicegateError:
            progress.outcomes["response" if "prompt" in progress.outcomes else "prompt"] = "error"
            await ledger.close(progress.outcomes, len(progress.answers))
            raise
        if end.rounds:
            self._keeper.metrics.rounds.labels(end.rounds).inc()
        self._account(progress)
        await ledger.close(progress.outcomes, end.attempts)
        return self._replies.reply(dialect, incoming, exchange, progress, end)

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
                    event: Event = await self._judge_prompt(exchange, progress)
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
                    progress.outcomes["response" if end.attempts else "prompt"] = end.outcome
                    return end
            commands.extend(progress.gate.feed(event))

    async def _judge_prompt(self, exchange: Exchange, progress: Progress) -> PromptJudged:
        is_partial = bool(exchange.unscannable)
        if is_partial:
            if self._policy.unscannable == "block":
                place = exchange.unscannable[0]
                raise Unscannable(
                    f"{place} cannot be scanned by any guard here, so it is not forwarded: leave it"
                    " out, or set unscannable: allow in the policy",
                    param=place,
                )
            self._keeper.metrics.bypasses.labels("unscannable").inc()
        judgements = await self._judgements("prompt", 0, exchange.fields, progress)
        if judgements is None:
            progress.outcomes["prompt"] = "bypassed"
            return PromptJudged(None)
        decision = self._judge.prevailing("prompt", judgements)
        if exchange.moderation is not None and exchange.moderation.blocks_prompt:
            decision = tightened(decision)
        progress.prompt = decision
        outcome = _PROMPT_OUTCOMES[decision.action]
        progress.outcomes["prompt"] = "bypassed" if is_partial and outcome != "blocked" else outcome
        return PromptJudged(decision, is_partial)

    async def _judge_response(
        self, exchange: Exchange, progress: Progress, choices: tuple[int, ...], deadline: float
    ) -> ResponseJudged | DeadlinePassed:
        attempt = len(progress.answers)
        fields = [field for number in choices for field in progress.choices[number].fields]
        if attempt == 1:
            # The first answer has the guard's own deadline; later ones the policy's beside it.
            judgements = await self._judgements("response", attempt, fields, progress)
        else:
            try:
                async with asyncio.timeout_at(deadline):
                    judgements = await self._judgements("response", attempt, fields, progress)
            except TimeoutError:
                return DeadlinePassed()
        decisions: dict[int, Decision | None] = dict.fromkeys(choices)
        if judgements is not None:
            tightens = exchange.moderation is not None and exchange.moderation.blocks_response
            rest = deque(judgements)
            for number in choices:
                own = [rest.popleft() for _ in progress.choices[number].fields]
                decision = self._judge.prevailing("response", own)
                decisions[number] = tightened(decision) if tightens else decision
        progress.decisions |= decisions
        return ResponseJudged(decisions)

    async def _judgements(
        self, direction: Direction, attempt: int, fields: Sequence[Field], progress: Progress
    ) -> list[Judgement] | None:
        """The judgements; None where the guard could not judge and the policy fails open."""
        started = time.perf_counter()
        try:
            judgements = await self._judge.judge(direction, fields)
        except GuardUnavailable:
            if self._policy.fail == "closed":
                raise
            self._keeper.metrics.bypasses.labels("guard_unavailable").inc()
            return None
        progress.ledger.judged(direction, attempt, judgements, time.perf_counter() - started)
        return judgements

    async def _generate(
        self,
        dialect: Dialect,
        incoming: Incoming,
        exchange: Exchange,
        progress: Progress,
        command: Generate,
        deadline: float,
    ) -> Generated | DeadlinePassed:
        if command.attempt == 1:
            changed = dialect.forwarded(exchange)
            body = incoming.raw if changed is None else dumps(changed).encode()
            response, answer = await self._ask(dialect, incoming, exchange, progress, body)
            numbers = tuple(choice.index for choice in answer.choices)
        else:
            assert command.choices is not ALL
            assert command.because is not None
            numbers = command.choices
            retry = Retry(
                seed=_seed(exchange, command.attempt),
                instruction=instruction(command.because),
                choices=numbers,
            )
            exchange = replace(exchange, instruction=retry.instruction, asked_again=numbers)
            body = dumps(dialect.retried(exchange, retry)).encode()
            try:
                async with asyncio.timeout_at(deadline):
                    response, answer = await self._ask(dialect, incoming, exchange, progress, body)
            except (TimeoutError, UpstreamError, _NotOurs):
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
        if answer.unscannable:
            self._keeper.metrics.bypasses.labels("unscannable").inc()
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
            raise _NotOurs(response)
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
        if answer.unscannable and not passes:
            raise UpstreamMalformed(
                f"{answer.unscannable[0]} of the upstream's answer cannot be scanned by any guard"
                " here, so it is not passed on: set unscannable: allow in the policy",
                code="unscannable",
            )
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


_PROMPT_OUTCOMES: Final[Mapping[Action, Outcome]] = {
    Action.ALLOW: "allowed",
    Action.ANNOTATE: "annotated",
    Action.BLOCK: "blocked",
}


def instruction(because: Decision) -> str:
    """What the model is told before it tries again: category and severity, never the harm."""
    verdict = because.verdict
    names = ", ".join(name.replace("_", " ") for name in verdict.categories[:3]) or "harm"
    return (
        f"A previous answer to this conversation was withheld, because it was judged to be of"
        f" {verdict.level.label} severity ({names}). Answer again without anything of that kind:"
        " give what help is safe, and where none is, say briefly that you cannot help with it."
    )


def _seed(exchange: Exchange, attempt: int) -> int:
    """Another seed for each attempt; reproducible where the client gave one."""
    given = exchange.body.get("seed")
    start = given if type(given) is int else secrets.randbelow(_SEEDS)
    return (start + attempt - 1) % _SEEDS
