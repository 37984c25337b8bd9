"""Judges the two sides of an exchange under its policy, and notes what came of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from service import tracing
from service.errors import GuardUnavailable, Unscannable, UpstreamMalformed
from service.exchange import Direction, Exchange, Field
from service.gate import Outcome, PromptJudged
from service.judgement import FieldJudge, Judgement, prevailing
from service.ledger import Bookkeeper
from service.policy import Action, Decision, Policy, tightened
from service.replies import Progress


class Examiner:
    """Holds the judge and the books."""

    def __init__(self, judge: FieldJudge, keeper: Bookkeeper, policy: Policy) -> None:
        self.policy = policy
        self.tracer = keeper.tracer
        self._judge = judge
        self._keeper = keeper

    def admit(self, exchange: Exchange) -> None:
        """Raises ``Unscannable`` for what no guard reads and the policy does not let pass: before
        anything of it reaches an upstream, which might fetch or run it.
        """
        if not exchange.unscannable:
            return
        if self.policy.unscannable == "block":
            place = exchange.unscannable[0]
            raise Unscannable(
                f"{place} cannot be scanned by any guard here, so it is not forwarded: leave it"
                " out, or set unscannable: allow in the policy",
                param=place,
            )
        self._keeper.metrics.bypasses.labels("unscannable").inc()

    def admit_event(self, unscannable: Iterable[str]) -> None:
        """Raises ``UpstreamMalformed`` for what of an answer no guard reads and the policy does not
        let pass.
        """
        place = next(iter(unscannable), None)
        if place is not None and self.policy.unscannable == "block":
            raise UpstreamMalformed(
                f"{place} of the upstream's answer cannot be scanned by any guard here, so it is"
                " not passed on: set unscannable: allow in the policy",
                code="unscannable",
            )

    def admit_answer(self, unscannable: Sequence[str]) -> None:
        """As ``admit_event``, of a whole answer: what passes is counted."""
        self.admit_event(unscannable)
        if unscannable:
            self._keeper.metrics.bypasses.labels("unscannable").inc()

    async def prompt(self, exchange: Exchange, progress: Progress) -> PromptJudged:
        """The decision on a prompt. Raises what judging raises."""
        is_partial = bool(exchange.unscannable)
        judgements = await self._judgements("prompt", 0, exchange.fields, progress)
        if judgements is None:
            progress.outcomes["prompt"] = "bypassed"
            return PromptJudged(None)
        decision = prevailing(self.policy, "prompt", judgements)
        if exchange.moderation is not None and exchange.moderation.blocks_prompt:
            decision = tightened(decision)
        progress.prompt = decision
        outcome = _PROMPT_OUTCOMES[decision.action]
        progress.outcomes["prompt"] = "bypassed" if is_partial and outcome != "blocked" else outcome
        return PromptJudged(decision, is_partial)

    async def response(
        self,
        exchange: Exchange,
        attempt: int,
        fields: Mapping[int, Sequence[Field]],
        progress: Progress,
    ) -> dict[int, Decision | None]:
        """The decision on each choice, of what ``fields`` say of it; None where no guard could
        judge and the policy lets that pass.
        """
        every = [field for own in fields.values() for field in own]
        is_sent = exchange.stream and self.policy.stream.mode == "monitor"
        judgements = await self._judgements("response", attempt, every, progress, is_sent=is_sent)
        decisions: dict[int, Decision | None] = dict.fromkeys(fields)
        if judgements is not None:
            tightens = exchange.moderation is not None and exchange.moderation.blocks_response
            rest = deque(judgements)
            for number, own in fields.items():
                decision = prevailing(self.policy, "response", [rest.popleft() for _ in own])
                decisions[number] = tightened(decision) if tightens else decision
        progress.decide(attempt, decisions)
        return decisions

    async def _judgements(
        self,
        direction: Direction,
        attempt: int,
        fields: Sequence[Field],
        progress: Progress,
        *,
        is_sent: bool = False,
    ) -> list[Judgement] | None:
        """The judgements; None where the guard could not judge and the policy fails open."""
        started = time.perf_counter()
        said: dict[str, tracing.Value] = {
            tracing.GUARD: self._keeper.guard_id,
            tracing.TARGET: tracing.TARGETS[direction],
            tracing.POLICY: self.policy.label,
            tracing.ATTEMPT: attempt,
            tracing.FIELDS: len(fields),
        }
        try:
            with self._keeper.tracer.span(tracing.JUDGEMENT, said) as span:
                judgements = await self._judge.judge(self.policy, direction, fields)
                decision = prevailing(self.policy, direction, judgements)
                span.set_attribute(tracing.VERDICT, decision.verdict.level.label)
                span.set_attribute(tracing.SCORE, decision.verdict.severity_score)
                span.set_attribute(tracing.ACTION, decision.action.label)
        except GuardUnavailable:
            # What a monitored stream says has been sent already: there is nothing to keep back.
            if self.policy.fail == "closed" and not is_sent:
                raise
            self._keeper.metrics.bypasses.labels("guard_unavailable").inc()
            return None
        progress.ledger.judged(direction, attempt, judgements, time.perf_counter() - started)
        return judgements


_PROMPT_OUTCOMES: Final[Mapping[Action, Outcome]] = {
    Action.ALLOW: "allowed",
    Action.ANNOTATE: "annotated",
    Action.BLOCK: "blocked",
}
