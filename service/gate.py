"""The gate: one state machine, without I/O, that decides what becomes of an exchange.

It is fed events and yields commands. A driver carries the commands out and feeds back what came of
them; tests do so with lists. An exchange begins with ``start`` and is over at ``End``.

    start ──▶ Judge(prompt) ──PromptJudged──▶ Refuse, End                       (block)
                                         └──▶ Generate(1, all choices)          (else)
    Generated ──▶ Judge(response) ──ResponseJudged──▶ Release / Refuse, End     (settled)
                                                └──▶ Generate(k + 1, flagged)   (regenerate)
    DeadlinePassed ──▶ what is unsettled is refused, End

A choice is released only once it was judged. Only flagged choices are generated again.

While an answer streams in, it may be released in pieces, before its ``Generated``:

    Grown ──▶ JudgePieces ──PiecesJudged──▶ ReleaseUpTo                         (cleared)
                                       ├──▶ Cut                                 (some was released)
                                       └──▶ as ResponseJudged, at Generated     (none was)

One judgement is on its way at a time; what grows meanwhile waits for it. A piece that is cleared
and yet looks doubtful waits for the next to be cleared too, for so many characters: harm often
shows only in what follows. ``speculative`` asks the upstream while the prompt is judged: nothing is
released before that verdict, and a blocked prompt stops the attempt. ``monitor`` releases before it
judges, and only tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from service.exchange import Direction
from service.policy import Action, Decision, Policy, Regenerate, strongest

Outcome = Literal["allowed", "annotated", "regenerated", "blocked", "bypassed", "error"]

ALL: Final = None
"""In place of choice numbers: all that were asked for."""

DOUBTFUL_CHARACTERS: Final = 1500
"""No more than this is held back for looking doubtful."""

WHOLE: Final = 1 << 62
"""In place of a number of characters: however many come."""


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
class Grown:
    """These choices can be judged up to so many characters, of what streams in."""

    ends: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class PiecesJudged:
    """The decision on each choice that was to be judged in part, up to where it was asked for."""

    decisions: Mapping[int, Decision | None]


@dataclass(frozen=True, slots=True)
class ResponseJudged:
    """The decision on each choice that was to be judged; None as in ``PromptJudged``."""

    decisions: Mapping[int, Decision | None]


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The policy's time for regenerating is over."""


Event = PromptJudged | Grown | PiecesJudged | Generated | ResponseJudged | DeadlinePassed


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
class JudgePieces:
    """Judge these choices up to so many characters."""

    ends: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class ReleaseUpTo:
    """Let these choices go up to so many characters; more may follow."""

    ends: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Cut:
    """End these choices where they stand: some of each was released, and no more may be."""

    choices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop the attempt that runs: nothing more of it is needed."""


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


Command = Judge | Generate | JudgePieces | ReleaseUpTo | Cut | Stop | Release | Refuse | End


class Gate:
    """One exchange of so many choices. Raises ``AssertionError`` on an event that it did not ask
    for.
    """

    def __init__(
        self,
        bounds: Regenerate,
        *,
        choices: int = 1,
        doubt: float = 1.0,
        speculative: bool = False,
        monitor: bool = False,
    ) -> None:
        """``doubt`` is the severity score from which a piece that is cleared looks doubtful."""
        self._bounds = bounds
        self._doubt = doubt
        self._speculative = speculative
        self._monitor = monitor
        self._attempt = 0
        self._tokens = 0
        self._awaits: type[Event] | None = None
        self._awaits_prompt = False
        self._live = choices
        """Choices of the attempt that runs of which more may be released."""
        self._grown: dict[int, int] = {}
        self._judging: Mapping[int, int] = {}
        self._passed: dict[int, int] = {}
        self._flagged: dict[int, Decision] = {}
        self._generated: Generated | None = None
        """The end of an attempt that came while something was judged."""
        self._released: list[int] = []
        self._refused: list[int] = []
        self._cut: list[int] = []
        self._pending: tuple[int, ...] = ()
        self._annotated = False
        self._bypassed = False
        self._exhausted = False

    @classmethod
    def of(cls, policy: Policy, *, choices: int = 1, is_stream: bool) -> Gate:
        """The gate of one exchange under ``policy``."""
        stream = policy.stream
        return cls(
            policy.regenerate,
            choices=choices,
            doubt=stream.doubt,
            speculative=is_stream and stream.speculative,
            monitor=is_stream and stream.mode == "monitor",
        )

    def start(self) -> list[Command]:
        """The first commands."""
        self._awaits_prompt = True
        if self._speculative:
            return [Judge("prompt"), self._generate(ALL, None)]
        return [Judge("prompt")]

    def feed(self, event: Event) -> list[Command]:
        """What follows from ``event``."""
        match event:
            case DeadlinePassed():
                return self._give_up()
            case PromptJudged():
                assert self._awaits_prompt, f"{event} was not asked for"
                return self._prompt_judged(event)
            case Grown(ends):
                assert self._awaits is Generated, f"{event} was not asked for"
                self._grown |= ends
                return self._judge_pieces()
            case PiecesJudged(decisions):
                assert set(decisions) == set(self._judging), f"{event} was not asked for"
                return self._pieces_judged(decisions)
            case Generated():
                assert self._awaits is Generated, f"{event} was not asked for"
                self._generated = event
                return self._attempt_ended()
            case ResponseJudged(decisions):
                assert set(decisions) == set(self._pending), f"{event} was not asked for"
                return self._response_judged(decisions)

    def _prompt_judged(self, event: PromptJudged) -> list[Command]:
        self._awaits_prompt = False
        self._bypassed |= event.is_partial
        decision = event.decision
        if decision is None:
            self._bypassed = True
        elif decision.action is Action.BLOCK:
            stop: list[Command] = [Stop()] if self._awaits is Generated else []
            self._awaits = None
            return [*stop, Refuse(ALL), End("blocked", 0)]
        elif decision.action is Action.ANNOTATE:
            self._annotated = True
        commands: list[Command] = [] if self._speculative else [self._generate(ALL, None)]
        if self._monitor:
            commands.append(self._release(dict.fromkeys(range(self._live), WHOLE)))
        following = self._attempt_ended() if self._generated else self._judge_pieces()
        return [*commands, *following]

    def _judge_pieces(self) -> list[Command]:
        if self._awaits_prompt or self._judging:
            return []
        settled = self._settled()
        ends = {choice: end for choice, end in self._grown.items() if choice not in settled}
        self._grown = {}
        if not ends:
            return []
        self._judging = ends
        return [JudgePieces(ends)]

    def _pieces_judged(self, decisions: Mapping[int, Decision | None]) -> list[Command]:
        ends, self._judging = self._judging, {}
        cleared, cut = {}, []
        for choice, decision in decisions.items():
            if not self._stops(decision):
                if not self._is_doubtful(decision, ends[choice] - self._passed.get(choice, 0)):
                    cleared[choice] = ends[choice]
            elif self._passed.get(choice):
                cut.append(choice)
            else:
                assert decision is not None
                self._flagged[choice] = decision
        commands: list[Command] = []
        if cleared and not self._monitor:
            commands.append(self._release(cleared))
        if cut:
            self._cut += cut
            commands.append(Cut(_in_order(cut)))
        if self._generated is not None:
            return [*commands, *self._attempt_ended()]
        if len(self._settled()) >= self._live:
            # What is still to come of this attempt is of no use to anybody.
            return [*commands, Stop()]
        return [*commands, *self._judge_pieces()]

    def _stops(self, decision: Decision | None) -> bool:
        """Whether a choice with this decision may not go on; notes what else it says."""
        if decision is None:
            self._bypassed = True
            return False
        self._annotated |= decision.action is not Action.ALLOW
        return decision.action >= Action.REGENERATE and not self._monitor

    def _is_doubtful(self, decision: Decision | None, characters: int) -> bool:
        if decision is None or characters >= DOUBTFUL_CHARACTERS:
            return False
        return decision.verdict.severity_score >= self._doubt

    def _release(self, ends: Mapping[int, int]) -> ReleaseUpTo:
        self._passed |= ends
        return ReleaseUpTo(dict(ends))

    def _settled(self) -> set[int]:
        """Choices of which nothing more is released in this attempt."""
        return {*self._cut, *self._flagged}

    def _attempt_ended(self) -> list[Command]:
        """Judges what is left of an attempt, once nothing else is judged."""
        event = self._generated
        assert event is not None
        if self._awaits_prompt or self._judging:
            return []
        self._generated = None
        self._grown = {}
        self._tokens += event.tokens
        self._bypassed |= event.is_partial
        self._pending = tuple(c for c in event.choices if c not in self._settled())
        self._awaits = ResponseJudged
        if not self._pending and self._settled():
            return self._response_judged({})
        return [Judge("response", self._pending)]

    def _response_judged(self, decisions: Mapping[int, Decision | None]) -> list[Command]:
        commands: list[Command] = []
        cut = []
        for choice, decision in decisions.items():
            if not self._stops(decision):
                self._released.append(choice)
            elif self._passed.get(choice):
                cut.append(choice)
            else:
                assert decision is not None
                self._flagged[choice] = decision
        if cut:
            self._cut += cut
            commands.append(Cut(_in_order(cut)))
        again = {c: d for c, d in self._flagged.items() if d.action is Action.REGENERATE}
        self._refused += (c for c in self._flagged if c not in again)
        self._flagged = {}
        self._pending = tuple(again)
        if not again:
            return [*commands, *self._settle()]
        if self._attempt > self._bounds.rounds or self._tokens >= self._bounds.max_tokens:
            return [*commands, *self._give_up()]
        return [*commands, self._generate(_in_order(again), strongest(again.values()))]

    def _generate(self, choices: tuple[int, ...] | None, because: Decision | None) -> Generate:
        self._attempt += 1
        self._awaits = Generated
        if choices is not ALL:
            self._pending = choices
            self._live = len(choices) + len(self._cut)
        return Generate(self._attempt, choices, because)

    def _give_up(self) -> list[Command]:
        """Refuses whatever is not settled, and cuts what was released in part."""
        self._exhausted = True
        unsettled = [c for c in {*self._pending, *self._flagged} if c not in self._cut]
        cut = [c for c in unsettled if self._passed.get(c)]
        self._cut += cut
        self._refused += _in_order(c for c in unsettled if c not in cut)
        self._judging, self._grown, self._flagged = {}, {}, {}
        commands: list[Command] = [Cut(_in_order(cut))] if cut else []
        if not self._refused and not self._released and not self._cut:
            self._awaits = None
            return [Refuse(ALL), End("blocked", self._attempt, self._rounds())]
        return [*commands, *self._settle()]

    def _settle(self) -> list[Command]:
        self._awaits = None
        commands: list[Command] = []
        if self._released:
            commands.append(Release(_in_order(self._released)))
        if self._refused:
            commands.append(Refuse(_in_order(self._refused)))
        return [*commands, End(self._outcome(), self._attempt, self._rounds())]

    def _outcome(self) -> Outcome:
        if self._refused or self._cut:
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
        return "refused" if self._refused or self._cut else "rescued"


def _in_order(choices: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(choices))
