"""From fields to decisions: the guard judges each, the policy decides on each."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from models.taxonomy import Severity
from models.verdict import Verdict, nothing
from service.errors import GuardUnavailable, TooLarge
from service.exchange import Direction, Field, FieldName
from service.policy import Action, Decision, Policy, decide, strongest
from service.verdict_cache import Digest, VerdictCache

_LOW_SENSITIVITY: Final[frozenset[FieldName]] = frozenset({"tool_definition", "other"})
"""Fields towards the model that are rarely anybody's words: read one severity milder."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The decision on one field. ``digest`` is the keyed hash of what was judged."""

    field: Field
    decision: Decision
    digest: bytes


class FieldJudge:
    """Judges fields, within a deadline in seconds, ``most_fields`` at once."""

    def __init__(
        self,
        cache: VerdictCache,
        digest: Digest,
        *,
        deadline: float,
        most_fields: int,
    ) -> None:
        self._cache = cache
        self._digest = digest
        self._deadline = deadline
        self._most_fields = most_fields

    async def judge(
        self, policy: Policy, direction: Direction, fields: Sequence[Field]
    ) -> list[Judgement]:
        """A judgement of each field under ``policy``, in their order.

        A turn that was answered before is at most annotated, unless the policy's context is
        ``all``; so are turns joined, where one of those before is flagged by itself. Raises
        ``TooLarge``, and ``GuardUnavailable``, also where the deadline passes.
        """
        if len(fields) > self._most_fields:
            raise TooLarge(
                f"{len(fields)} texts are to be judged, over the {self._most_fields} of one"
                " request: send fewer messages, or raise fields_per_request",
                code="too_many_fields",
            )
        digests = [self._digest(field.judged) for field in fields]
        try:
            async with asyncio.timeout(self._deadline):
                verdicts = await self._cache.judge(
                    [field.judged for field in fields],
                    digests,
                    # An answer was paid for already: it does not wait behind new prompts.
                    is_answer=direction == "response",
                )
        except TimeoutError:
            raise GuardUnavailable(
                "the guard did not answer in time: try again, or raise guard_seconds"
            ) from None
        is_explained = any(
            field.is_past and verdict.level > Severity.NONE
            for field, verdict in zip(fields, verdicts, strict=True)
        )
        return [
            Judgement(field, _decide(policy, direction, field, verdict, is_explained), digest)
            for field, verdict, digest in zip(fields, verdicts, digests, strict=True)
        ]


def prevailing(policy: Policy, direction: Direction, judgements: Sequence[Judgement]) -> Decision:
    """The decision that prevails over all; where there was nothing to judge, the policy's on an
    empty text.
    """
    if not judgements:
        return decide(policy, direction, nothing(direction))
    return strongest(judgement.decision for judgement in judgements)


def _decide(
    policy: Policy, direction: Direction, field: Field, verdict: Verdict, is_explained: bool
) -> Decision:
    decision = decide(policy, direction, verdict)
    if direction == "prompt" and field.name in _LOW_SENSITIVITY:
        milder = decide(policy, direction, verdict.milder())
        decision = replace(milder, verdict=verdict)
    is_old = field.is_past or (field.is_joint and is_explained)
    if is_old and policy.context == "latest_turn":
        decision = replace(decision, action=min(decision.action, Action.ANNOTATE))
    return decision
