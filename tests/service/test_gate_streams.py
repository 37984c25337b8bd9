"""The gate while an answer streams in: what is released in pieces, and what ends a choice."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.verdict import nothing
from service.gate import (
    WHOLE,
    Command,
    Cut,
    DeadlinePassed,
    End,
    Event,
    Gate,
    Generate,
    Generated,
    Grown,
    Judge,
    JudgePieces,
    PiecesJudged,
    PromptJudged,
    Refuse,
    Release,
    ReleaseUpTo,
    ResponseJudged,
    Stop,
)
from service.policy import Action, Decision, Regenerate

ALLOW, ANNOTATE, REGENERATE, BLOCK = Action


def decided(action: Action) -> Decision:
    return Decision(action, rule=0, verdict=nothing("response"))


def pieces(*actions: Action | None) -> PiecesJudged:
    return PiecesJudged({n: None if a is None else decided(a) for n, a in enumerate(actions)})


def whole(*actions: Action | None) -> ResponseJudged:
    return ResponseJudged({n: None if a is None else decided(a) for n, a in enumerate(actions)})


def run(gate: Gate, *events: Event) -> list[list[Command]]:
    return [gate.start(), *(gate.feed(event) for event in events)]


PROMPT = PromptJudged(decided(ALLOW))
DONE = Generated((0,), tokens=10)


def test_a_piece_is_judged_and_then_released_and_the_rest_at_the_end() -> None:
    steps = run(
        Gate(Regenerate()), PROMPT, Grown({0: 40}), pieces(ALLOW), Grown({0: 90}), pieces(ALLOW),
        DONE, whole(ALLOW),
    )  # fmt: skip
    assert steps[2:] == [
        [JudgePieces({0: 40})],
        [ReleaseUpTo({0: 40})],
        [JudgePieces({0: 90})],
        [ReleaseUpTo({0: 90})],
        [Judge("response", (0,))],
        [Release((0,)), End("allowed", 1)],
    ]


def test_one_judgement_is_on_its_way_and_what_grows_meanwhile_waits_for_it() -> None:
    gate = Gate(Regenerate())
    run(gate, PROMPT, Grown({0: 40}))
    assert gate.feed(Grown({0: 60})) == []
    assert gate.feed(Grown({0: 80})) == []
    assert gate.feed(pieces(ALLOW)) == [ReleaseUpTo({0: 40}), JudgePieces({0: 80})]
    assert gate.feed(DONE) == []
    assert gate.feed(pieces(ALLOW)) == [ReleaseUpTo({0: 80}), Judge("response", (0,))]


@pytest.mark.parametrize("action", [REGENERATE, BLOCK])
def test_a_violation_after_text_was_released_ends_the_choice(action: Action) -> None:
    gate = Gate(Regenerate())
    run(gate, PROMPT, Grown({0: 40}), pieces(ALLOW), Grown({0: 90}))
    assert gate.feed(pieces(action)) == [Cut((0,)), Stop()]
    assert gate.feed(Generated((), tokens=5)) == [End("blocked", 1)]


def test_a_violation_at_the_very_end_cuts_too() -> None:
    steps = run(Gate(Regenerate()), PROMPT, Grown({0: 40}), pieces(ALLOW), DONE, whole(REGENERATE))
    assert steps[-1] == [Cut((0,)), End("blocked", 1)]


def test_a_violation_before_any_release_stops_the_attempt_and_tries_again() -> None:
    gate = Gate(Regenerate())
    run(gate, PROMPT, Grown({0: 40}))
    flagged = pieces(REGENERATE)
    assert gate.feed(flagged) == [Stop()]
    again = gate.feed(Generated((), tokens=5))
    assert again == [Generate(2, (0,), because=flagged.decisions[0])]
    steps = [gate.feed(Grown({0: 30})), gate.feed(pieces(ALLOW)), gate.feed(DONE)]
    assert steps == [[JudgePieces({0: 30})], [ReleaseUpTo({0: 30})], [Judge("response", (0,))]]
    assert gate.feed(whole(ALLOW)) == [Release((0,)), End("regenerated", 2, "rescued")]


def test_a_block_before_any_release_refuses() -> None:
    gate = Gate(Regenerate())
    run(gate, PROMPT, Grown({0: 40}), pieces(BLOCK))
    assert gate.feed(Generated((), tokens=5)) == [Refuse((0,)), End("blocked", 1)]


def test_of_three_choices_one_is_bad_and_the_others_go_on() -> None:
    gate = Gate(Regenerate(), choices=3)
    run(gate, PROMPT, Grown({0: 40, 1: 40, 2: 40}))
    assert gate.feed(pieces(ALLOW, REGENERATE, ALLOW)) == [ReleaseUpTo({0: 40, 2: 40})]
    assert gate.feed(Grown({0: 80, 1: 80, 2: 60})) == [JudgePieces({0: 80, 2: 60})]
    gate.feed(PiecesJudged({0: decided(ALLOW), 2: decided(BLOCK)}))
    assert gate.feed(Generated((0, 1, 2), 30)) == [Judge("response", (0,))]
    (again,) = gate.feed(whole(ALLOW))
    assert isinstance(again, Generate)
    assert (again.attempt, again.choices) == (2, (1,))
    assert gate.feed(Generated((1,), 10)) == [Judge("response", (1,))]
    assert gate.feed(ResponseJudged({1: decided(ALLOW)})) == [
        Release((0, 1)),
        End("blocked", 2, "refused"),
    ]


class TestSpeculative:
    def test_the_upstream_is_asked_while_the_prompt_is_judged(self) -> None:
        gate = Gate(Regenerate(), speculative=True)
        assert gate.start() == [Judge("prompt"), Generate(1)]
        assert gate.feed(Grown({0: 40})) == []
        assert gate.feed(PROMPT) == [JudgePieces({0: 40})]

    def test_a_blocked_prompt_stops_it_and_nothing_is_released(self) -> None:
        gate = Gate(Regenerate(), speculative=True)
        gate.start()
        gate.feed(Grown({0: 40}))
        assert gate.feed(PromptJudged(decided(BLOCK))) == [Stop(), Refuse(None), End("blocked", 0)]

    def test_an_answer_that_is_whole_before_the_prompts_verdict_waits_for_it(self) -> None:
        gate = Gate(Regenerate(), speculative=True)
        gate.start()
        assert gate.feed(DONE) == []
        assert gate.feed(PROMPT) == [Judge("response", (0,))]


class TestDoubt:
    def doubtful(self, score: float) -> PiecesJudged:
        verdict = replace(nothing("response"), at_least=(score, score, score))
        return PiecesJudged({0: Decision(ALLOW, rule=0, verdict=verdict)})

    def test_a_doubtful_piece_waits_for_the_next(self) -> None:
        gate = Gate(Regenerate(), doubt=0.1)
        run(gate, PROMPT, Grown({0: 40}))
        assert gate.feed(self.doubtful(0.1)) == []
        gate.feed(Grown({0: 80}))
        assert gate.feed(self.doubtful(0.05)) == [ReleaseUpTo({0: 80})]

    def test_what_is_flagged_after_a_doubtful_piece_is_generated_again(self) -> None:
        gate = Gate(Regenerate(), doubt=0.1)
        run(gate, PROMPT, Grown({0: 40}), self.doubtful(0.2), Grown({0: 80}))
        assert gate.feed(pieces(REGENERATE)) == [Stop()]

    def test_doubt_ends_with_the_answer(self) -> None:
        gate = Gate(Regenerate(), doubt=0.1)
        run(gate, PROMPT, Grown({0: 40}), self.doubtful(0.2), DONE)
        assert gate.feed(whole(ALLOW)) == [Release((0,)), End("allowed", 1)]

    def test_no_more_than_so_much_is_held_back(self) -> None:
        gate = Gate(Regenerate(), doubt=0.1)
        run(gate, PROMPT, Grown({0: 1499}), self.doubtful(0.2), Grown({0: 1500}))
        assert gate.feed(self.doubtful(0.2)) == [ReleaseUpTo({0: 1500})]


class TestMonitor:
    def test_it_passes_at_once_judges_behind_and_only_tells(self) -> None:
        gate = Gate(Regenerate(), monitor=True)
        steps = run(gate, PROMPT)
        assert steps[-1] == [Generate(1), ReleaseUpTo({0: WHOLE})]
        assert gate.feed(Grown({0: 40})) == [JudgePieces({0: 40})]
        assert gate.feed(pieces(BLOCK)) == []
        assert gate.feed(DONE) == [Judge("response", (0,))]
        assert gate.feed(whole(BLOCK)) == [Release((0,)), End("annotated", 1)]

    def test_nothing_passes_before_the_prompts_verdict(self) -> None:
        gate = Gate(Regenerate(), monitor=True, speculative=True)
        assert gate.start() == [Judge("prompt"), Generate(1)]
        assert gate.feed(Grown({0: 40})) == []
        assert gate.feed(PROMPT) == [ReleaseUpTo({0: WHOLE}), JudgePieces({0: 40})]


def test_no_guard_and_a_policy_that_fails_open_pass_and_say_so() -> None:
    steps = run(Gate(Regenerate()), PROMPT, Grown({0: 40}), pieces(None), DONE, whole(ALLOW))
    assert steps[3] == [ReleaseUpTo({0: 40})]
    assert steps[-1] == [Release((0,)), End("bypassed", 1)]


def test_the_deadline_cuts_what_was_released_in_part() -> None:
    gate = Gate(Regenerate())
    run(gate, PROMPT, Grown({0: 40}), pieces(REGENERATE), Generated((), 5))
    gate.feed(Grown({0: 20}))
    gate.feed(pieces(ALLOW))
    assert gate.feed(DeadlinePassed()) == [Cut((0,)), End("blocked", 2, "exhausted")]


ACTIONS = st.sampled_from([ALLOW, ALLOW, ALLOW, ANNOTATE, REGENERATE, BLOCK, None])


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(1, 3), st.booleans(), st.integers(0, 3))
def test_nothing_is_released_that_was_not_cleared(
    data: st.DataObject, choices: int, speculative: bool, rounds: int
) -> None:
    """A driver that does what it is told, with any decisions and any interleaving."""
    gate = Gate(Regenerate(rounds=rounds), choices=choices, speculative=speculative)
    queue: list[Any] = list(gate.start())
    waiting: dict[str, Any] = {}
    cleared: dict[int, int] = {}
    released: dict[int, int] = {}
    closed: set[int] = set()
    lengths: dict[int, int] = {}
    running: tuple[int, ...] = ()
    allowed = False
    for step in range(400):
        while queue:
            match queue.pop(0):
                case Judge("prompt"):
                    waiting["prompt"] = True
                case Judge(_, asked):
                    waiting["whole"] = asked
                case JudgePieces(ends):
                    assert "pieces" not in waiting, "one judgement at a time"
                    waiting["pieces"] = ends
                case Generate(_, asked):
                    running = tuple(range(choices)) if asked is None else asked
                    assert not any(released.get(choice) for choice in running)
                    lengths = dict.fromkeys(running, 0)
                    cleared = {c: n for c, n in cleared.items() if c not in running}
                case ReleaseUpTo(ends):
                    assert allowed, "the prompt's verdict comes first"
                    for choice, end in ends.items():
                        assert choice not in closed
                        assert end <= cleared[choice]
                        released[choice] = end
                case Cut(asked):
                    assert all(released.get(choice) for choice in asked)
                    closed |= set(asked)
                case Refuse(asked):
                    refused = range(choices) if asked is None else asked
                    assert not any(released.get(choice) for choice in refused)
                    closed |= set(refused)
                case Release(asked):
                    assert not closed & set(asked)
                    assert all(cleared.get(choice) == 10**9 for choice in asked)
                    closed |= set(asked)
                case Stop():
                    waiting["stopped"] = True
                case End():
                    assert closed == set(range(choices))
                    return
        can: list[str] = [name for name in ("prompt", "pieces", "whole") if name in waiting]
        if running:
            can += ["end"] if "stopped" in waiting or step > 60 else ["grow", "end"]
        event = data.draw(st.sampled_from(can))
        match event:
            case "prompt":
                del waiting["prompt"]
                action = data.draw(st.sampled_from([ALLOW, ALLOW, ANNOTATE, BLOCK]))
                allowed = action is not BLOCK
                queue += gate.feed(PromptJudged(decided(action)))
            case "grow":
                choice = data.draw(st.sampled_from(running))
                lengths[choice] += data.draw(st.integers(1, 50))
                queue += gate.feed(Grown({choice: lengths[choice]}))
            case "pieces" | "whole":
                asked = waiting.pop(event)
                decisions = {
                    c: None if a is None else decided(a)
                    for c in asked
                    for a in [data.draw(ACTIONS)]
                }
                for choice, decision in decisions.items():
                    if decision is None or decision.action < REGENERATE:
                        cleared[choice] = asked[choice] if event == "pieces" else 10**9
                kind = PiecesJudged if event == "pieces" else ResponseJudged
                queue += gate.feed(kind(decisions))
            case "end":
                waiting.pop("stopped", None)
                ended, running = running, ()
                queue += gate.feed(Generated(ended, 5))
    raise AssertionError("the gate did not end")
