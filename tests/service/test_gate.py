"""The gate, driven by lists: what it asks for, and what becomes of each exchange."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.taxonomy import Severity
from models.verdict import Verdict, nothing
from service.gate import (
    Command,
    DeadlinePassed,
    End,
    Event,
    Gate,
    Generate,
    Generated,
    Judge,
    PromptJudged,
    Refuse,
    Release,
    ResponseJudged,
)
from service.policy import Action, Decision, Regenerate

ALLOW, ANNOTATE, REGENERATE, BLOCK = Action


def decided(action: Action) -> Decision:
    return Decision(action, rule=0, verdict=nothing("response"))


def judged(*actions: Action | None, start: int = 0) -> ResponseJudged:
    """A decision for choices ``start`` and on."""
    return ResponseJudged(
        {
            number: None if action is None else decided(action)
            for number, action in enumerate(actions, start)
        }
    )


def run(gate: Gate, *events: Event) -> list[list[Command]]:
    """The commands at the start and after each event."""
    return [gate.start(), *(gate.feed(event) for event in events)]


ALLOWED_PROMPT = PromptJudged(decided(ALLOW))
ONE = Generated((0,), tokens=10)


def test_a_safe_exchange_is_judged_on_both_sides_and_released() -> None:
    assert run(Gate(Regenerate()), ALLOWED_PROMPT, ONE, judged(ALLOW)) == [
        [Judge("prompt")],
        [Generate(1)],
        [Judge("response", (0,))],
        [Release((0,)), End("allowed", 1)],
    ]


def test_a_blocked_prompt_never_reaches_the_upstream() -> None:
    assert run(Gate(Regenerate()), PromptJudged(decided(BLOCK)))[-1] == [
        Refuse(None),
        End("blocked", 0),
    ]


def test_a_blocked_answer_is_refused_without_another_try() -> None:
    assert run(Gate(Regenerate()), ALLOWED_PROMPT, ONE, judged(BLOCK))[-1] == [
        Refuse((0,)),
        End("blocked", 1),
    ]


def test_a_flagged_answer_is_generated_again_and_told_why() -> None:
    flagged = judged(REGENERATE)
    steps = run(Gate(Regenerate()), ALLOWED_PROMPT, ONE, flagged, ONE, judged(ALLOW))
    assert steps[3] == [Generate(2, (0,), because=flagged.decisions[0])]
    assert steps[-1] == [Release((0,)), End("regenerated", 2, "rescued")]


def test_only_the_flagged_choices_are_generated_again() -> None:
    steps = run(
        Gate(Regenerate()),
        ALLOWED_PROMPT,
        Generated((0, 1, 2), 30),
        judged(ALLOW, REGENERATE, BLOCK),
        Generated((1,), 10),
        judged(ALLOW, start=1),
    )
    (generate,) = steps[3]
    assert isinstance(generate, Generate)
    assert generate.choices == (1,)
    assert steps[-1] == [Release((0, 1)), Refuse((2,)), End("blocked", 2, "refused")]


@pytest.mark.parametrize("rounds", [0, 1, 5])
def test_rounds_are_bounded_and_then_refused(rounds: int) -> None:
    gate = Gate(Regenerate(rounds=rounds))
    gate.start()
    gate.feed(ALLOWED_PROMPT)
    for attempt in range(1, rounds + 2):
        gate.feed(ONE)
        last = gate.feed(judged(REGENERATE))
        assert isinstance(last[0], Generate) == (attempt <= rounds)
    assert last == [Refuse((0,)), End("blocked", rounds + 1, "exhausted")]


def test_no_attempt_is_begun_beyond_the_token_budget() -> None:
    gate = Gate(Regenerate(max_tokens=15))
    steps = run(gate, ALLOWED_PROMPT, ONE, judged(REGENERATE), ONE, judged(REGENERATE))
    assert isinstance(steps[3][0], Generate)
    assert steps[-1] == [Refuse((0,)), End("blocked", 2, "exhausted")]


def test_the_deadline_refuses_what_is_not_settled_and_keeps_what_is() -> None:
    steps = run(
        Gate(Regenerate()),
        ALLOWED_PROMPT,
        Generated((0, 1), 20),
        judged(ALLOW, REGENERATE),
        DeadlinePassed(),
    )
    assert steps[-1] == [Release((0,)), Refuse((1,)), End("blocked", 2, "exhausted")]


def test_annotation_releases_and_shows_in_the_outcome() -> None:
    assert run(Gate(Regenerate()), ALLOWED_PROMPT, ONE, judged(ANNOTATE))[-1] == [
        Release((0,)),
        End("annotated", 1),
    ]
    assert run(Gate(Regenerate()), PromptJudged(decided(ANNOTATE)), ONE, judged(ALLOW))[-1] == [
        Release((0,)),
        End("annotated", 1),
    ]


@pytest.mark.parametrize(("prompt", "response"), [(None, ALLOW), (ALLOW, None), (None, None)])
def test_what_passes_without_a_verdict_is_never_called_allowed(
    prompt: Action | None, response: Action | None
) -> None:
    first = PromptJudged(None if prompt is None else decided(prompt))
    assert run(Gate(Regenerate()), first, ONE, judged(response))[-1][-1] == End("bypassed", 1)


def test_an_event_that_was_not_asked_for_is_a_bug() -> None:
    gate = Gate(Regenerate())
    gate.start()
    with pytest.raises(AssertionError, match="not asked for"):
        gate.feed(ONE)


@given(
    rounds=st.integers(0, 4),
    choices=st.integers(1, 4),
    data=st.data(),
)
def test_every_choice_ends_released_after_a_clearing_judgement_or_refused(
    rounds: int, choices: int, data: st.DataObject
) -> None:
    gate = Gate(Regenerate(rounds=rounds))
    commands = [*gate.start(), *gate.feed(ALLOWED_PROMPT)]
    cleared: set[int] = set()
    released: set[int] = set()
    refused: set[int] = set()
    generated = 0
    while not isinstance(commands[-1], End):
        command = commands[-1]
        if isinstance(command, Generate):
            generated += 1
            numbers = tuple(range(choices)) if command.choices is None else command.choices
            commands = gate.feed(Generated(numbers, 1))
        elif data.draw(st.integers(0, 9)) == 0 and generated > 1:
            commands = gate.feed(DeadlinePassed())
        else:
            assert isinstance(command, Judge)
            actions = {n: data.draw(st.sampled_from(Action)) for n in command.choices}
            cleared |= {n for n, action in actions.items() if action <= ANNOTATE}
            commands = gate.feed(
                ResponseJudged({n: decided(action) for n, action in actions.items()})
            )
    for step in commands:
        if isinstance(step, Release):
            released |= set(step.choices)
        elif isinstance(step, Refuse):
            refused |= set(range(choices)) if step.choices is None else set(step.choices)
    assert generated <= rounds + 1
    assert released == cleared
    assert released | refused == set(range(choices))
    assert not released & refused


def test_the_gravest_flagged_choice_is_what_the_model_is_told() -> None:
    grave = Decision(REGENERATE, 0, _with_level(Severity.SEVERE))
    mild = Decision(REGENERATE, 0, _with_level(Severity.MINOR))
    steps = run(
        Gate(Regenerate()),
        ALLOWED_PROMPT,
        Generated((0, 1), 2),
        ResponseJudged({0: mild, 1: grave}),
    )
    assert steps[-1] == [Generate(2, (0, 1), because=grave)]


def _with_level(level: Severity) -> Verdict:
    return replace(
        nothing("response"), at_least=(float(level >= 1), float(level >= 2), float(level >= 3))
    )
