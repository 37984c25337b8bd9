"""From fields to decisions: the guard judges each, the policy decides on each."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from models.verdict import nothing
from service.batcher import Batcher
from service.errors import GuardUnavailable
from service.exchange import Direction, Field
from service.policy import Action, Decision, Policy, decide, strongest


@dataclass(frozen=True, slots=True)
class Judgement:
    """The decision on one field."""

    field: Field
    decision: Decision


class FieldJudge:
    """Judges fields under a policy, within a deadline in seconds."""

    def __init__(self, batcher: Batcher, policy: Policy, deadline: float) -> None:
        self.batcher = batcher
        self.policy = policy
        self._deadline = deadline

    async def judge(self, direction: Direction, fields: Sequence[Field]) -> list[Judgement]:
        """A judgement of each field, in their order.

        A turn that was answered before is at most annotated, unless the policy's context is
        ``all``. Raises ``GuardUnavailable``, also where the deadline passes.
        """
        try:
            async with asyncio.timeout(self._deadline):
                verdicts = await self.batcher.judge(
                    [field.judged for field in fields],
                    # An answer was paid for already: it does not wait behind new prompts.
                    admit=direction == "prompt",
                )
        except TimeoutError:
            raise GuardUnavailable(
                "the guard did not answer in time: try again, or raise guard_seconds"
            ) from None
        judgements = []
        for field, verdict in zip(fields, verdicts, strict=True):
            decision = decide(self.policy, direction, verdict)
            if field.is_past and self.policy.context == "latest_turn":
                decision = replace(decision, action=min(decision.action, Action.ANNOTATE))
            judgements.append(Judgement(field, decision))
        return judgements

    def prevailing(self, direction: Direction, judgements: Sequence[Judgement]) -> Decision:
        """The decision that prevails over all; where there was nothing to judge, the policy's
        on an empty text.
        """
        if not judgements:
            return decide(self.policy, direction, nothing(direction))
        return strongest(judgement.decision for judgement in judgements)
