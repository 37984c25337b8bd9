"""The gate: one state machine, without I/O, that decides what becomes of an exchange.

It is fed events and yields commands. A driver carries the commands out and feeds back what came of
them; tests do so with lists. An exchange begins with ``start`` and is over at ``End``.

    start ──▶ Judge(prompt) ──PromptJudged──▶ Refuse, End                       (block)
                                         └──▶ Generate(1, all choices)          (else)
    Generated ──▶ Judge(response) ──ResponseJudged──▶ Release / Refuse, End     (settled)
                                                └──▶ Generate(k + 1, flagged)   (regenerate)
    DeadlinePassed ──▶ what is unsettled is refused, End

A choice is released only once it was judged. Only flagged choices are generated again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from service.exchange import Direction
from service.policy import Action, Decision, Regenerate, strongest

Outcome = Literal["allowed", "annotated", "regenerated", "blocked", "bypassed", "error"]

ALL: Final = None
"""In place of choice numbers: all that were asked for."""


# --- Events ------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class PromptJudged:
    """The prompt's decision; None if no guard could judge and the policy lets that pass.

    ``is_partial`` tells that some of it could not be scanned, and the policy lets that pass.
    """

    decision: Decision | None
    is_partial: bool = False


@dataclass(frozen=True, slots=True)
class Generated:
    """The upstream answered with these choices, at this cost in completion tokens."""

    choices: tuple[int, ...]
    tokens: int
    is_partial: bool = False
    """As in ``PromptJudged``."""


@dataclass(frozen=True, slots=True)
class ResponseJudged:
    """The decision on each choice that was to be judged; None as in ``PromptJudged``."""

    decisions: Mapping[int, Decision | None]


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The policy's time for regenerating is over."""


Event = PromptJudged | Generated | ResponseJudged | DeadlinePassed


# --- Commands ----------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Judge:
    """Judge the prompt, or these choices of the newest attempt."""

    direction: Direction
    choices: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Generate:
    """Ask the upstream. ``attempt`` is 1 for the first; ``because`` says what was wrong."""

    attempt: int
    choices: tuple[int, ...] | None = ALL
    because: Decision | None = None


@dataclass(frozen=True, slots=True)
class Release:
    """Let these choices go, as their attempt gave them."""

    choices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Refuse:
    """Put a refusal in place of these choices."""

    choices: tuple[int, ...] | None = ALL


@dataclass(frozen=True, slots=True)
class End:
    """The exchange is over. ``rounds`` is how regenerating ended, where it was tried."""

    outcome: Outcome
    attempts: int
    rounds: Literal["rescued", "refused", "exhausted"] | None = None


Command = Judge | Generate | Release | Refuse | End


class Gate:
    """One exchange. Raises ``AssertionError`` on an event that it did not ask for."""

    def __init__(self, bounds: Regenerate) -> None:
        self._bounds = bounds
        self._attempt = 0
        self._tokens = 0
        self._awaits: type[Event] | None = None
        self._released: list[int] = []
        self._refused: list[int] = []
        self._pending: tuple[int, ...] = ()
        self._annotated = False
        self._bypassed = False
        self._exhausted = False

    def start(self) -> list[Command]:
        """The first command."""
        self._awaits = PromptJudged
        return [Judge("prompt")]

    def feed(self, event: Event) -> list[Command]:
        """What follows from ``event``."""
        if isinstance(event, DeadlinePassed):
            return self._give_up()
        assert self._awaits is type(event), f"{event} was not asked for"
        match event:
            case PromptJudged(decision, is_partial):
                self._bypassed |= is_partial
                return self._prompt_judged(decision)
            case Generated(choices, tokens, is_partial):
                self._tokens += tokens
                self._bypassed |= is_partial
                self._pending = choices
                self._awaits = ResponseJudged
                return [Judge("response", choices)]
            case ResponseJudged(decisions):
                return self._response_judged(decisions)

    def _prompt_judged(self, decision: Decision | None) -> list[Command]:
        if decision is None:
            self._bypassed = True
        elif decision.action is Action.BLOCK:
            return [Refuse(ALL), End("blocked", 0)]
        elif decision.action is Action.ANNOTATE:
            self._annotated = True
        return [self._generate(ALL, None)]

    def _response_judged(self, decisions: Mapping[int, Decision | None]) -> list[Command]:
        assert set(decisions) == set(self._pending)
        flagged: dict[int, Decision] = {}
        for choice, decision in decisions.items():
            if decision is None:
                self._bypassed = True
                self._released.append(choice)
            elif decision.action is Action.REGENERATE:
                flagged[choice] = decision
            elif decision.action is Action.BLOCK:
                self._refused.append(choice)
            else:
                self._annotated |= decision.action is Action.ANNOTATE
                self._released.append(choice)
        self._pending = tuple(flagged)
        if not flagged:
            return self._settle()
        if self._attempt > self._bounds.rounds or self._tokens >= self._bounds.max_tokens:
            return self._give_up()
        return [self._generate(self._pending, strongest(flagged.values()))]

    def _generate(self, choices: tuple[int, ...] | None, because: Decision | None) -> Generate:
        self._attempt += 1
        self._awaits = Generated
        return Generate(self._attempt, choices, because)

    def _give_up(self) -> list[Command]:
        """Refuses whatever is not settled."""
        self._exhausted = True
        self._refused += self._pending
        if not self._refused and not self._released:
            self._awaits = None
            return [Refuse(ALL), End("blocked", self._attempt, self._rounds())]
        return self._settle()

    def _settle(self) -> list[Command]:
        self._awaits = None
        commands: list[Command] = []
        if self._released:
            commands.append(Release(_in_order(self._released)))
        if self._refused:
            commands.append(Refuse(_in_order(self._refused)))
        return [*commands, End(self._outcome(), self._attempt, self._rounds())]

    def _outcome(self) -> Outcome:
        if self._refused:
            return "blocked"
        if self._bypassed:
            return "bypassed"
        if self._attempt > 1:
            return "regenerated"
        return "annotated" if self._annotated else "allowed"

    def _rounds(self) -> Literal["rescued", "refused", "exhausted"] | None:
        if self._exhausted:
            return "exhausted"
        if self._attempt <= 1:
            return None
        return "refused" if self._refused else "rescued"


def _in_order(choices: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(choices))
