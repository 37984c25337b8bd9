"""The training mix: what is taken, what is held out, and how signals are labelled."""

import json
from pathlib import Path
from typing import Any

import pytest

from models.taxonomy import SIGNALS
from training.labelled import LabelError
from training.mix import Mix, MixConfig, Row, Source, build


def prompt(number: int, text: str, **labels: Any) -> dict[str, Any]:
    return {"id": str(number), "source": "s", "role": "prompt", "prompt": text} | labels


def rows_of(directory: Path, rows: list[dict[str, Any]], share: float = 0.5, **more: Any) -> Mix:
    path = directory / "f.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    config = MixConfig(name="m", licence="x", sources=(Source(file="f.jsonl", **more),))
    return build(directory, [config], share, seed=1)


def signals_of(row: Row) -> dict[str, bool | None]:
    return dict(zip(SIGNALS, row.signals, strict=True))


def the_only(directory: Path, row: dict[str, Any], **more: Any) -> Row:
    mix = rows_of(directory, [row], **more)
    (found,) = (*mix.fit, *mix.held_out)
    return found


def test_equal_texts_are_taken_once_whatever_their_case_and_punctuation(tmp_path: Path) -> None:
    mix = rows_of(tmp_path, [prompt(1, "How, now?"), prompt(2, "how now"), prompt(3, "else")])
    assert len(mix.fit) + len(mix.held_out) == 2
    assert mix.dropped["repeated"] == 1


def test_answers_to_one_prompt_stay_on_one_side(tmp_path: Path) -> None:
    rows = [
        prompt(10 * p + a, f"question {p}", role="response", response=f"answer {a} to {p}")
        for p in range(40)
        for a in range(3)
    ]
    mix = rows_of(tmp_path, rows)
    fit = {row.example.prompt for row in mix.fit}
    held_out = {row.example.prompt for row in mix.held_out}
    assert fit
    assert held_out
    assert not fit & held_out


def test_a_cap_takes_that_many_and_the_same_ones_each_time(tmp_path: Path) -> None:
    rows = [prompt(number, f"text {number}") for number in range(50)]
    first, second = (rows_of(tmp_path, rows, cap=7) for _ in range(2))
    assert len(first.fit) + len(first.held_out) == 7
    assert first == second


@pytest.mark.parametrize(
    ("row", "more", "signal", "label"),
    [
        (prompt(1, "x", unsafe=True), {"injection": "unsafe"}, "injection", True),
        (prompt(1, "x", unsafe=False), {"injection": "unsafe"}, "injection", False),
        (prompt(1, "x"), {"injection": True}, "injection", True),
        (prompt(1, "x"), {}, "injection", None),
        (prompt(1, "I want to kill myself"), {}, "self_harm", True),
        (prompt(1, "kill the process"), {}, "self_harm", False),
        (prompt(1, "x", categories=["Suicide and Self Harm"]), {}, "self_harm", True),
        (
            prompt(1, "a child", unsafe=True, severity=3, pku_categories=["sexual_content"]),
            {},
            "minors",
            True,
        ),
        (prompt(1, "a child", unsafe=True, pku_categories=["drugs"]), {}, "minors", False),
        (prompt(1, "a child"), {}, "minors", None),
        (
            prompt(1, "x", role="response", response="no", refusal=True),
            {},
            "refusal",
            True,
        ),
        (prompt(1, "x", role="response", response="no"), {}, "refusal", None),
        (prompt(1, "x"), {}, "refusal", False),
    ],
)
def test_signals(
    tmp_path: Path, row: dict[str, Any], more: dict[str, Any], signal: str, label: bool | None
) -> None:
    assert signals_of(the_only(tmp_path, row, **more))[signal] is label


def test_a_source_whose_flag_is_not_harm_labels_only_its_signal(tmp_path: Path) -> None:
    row = the_only(tmp_path, prompt(1, "x", unsafe=True), injection="unsafe", labels="signals")
    assert row.example.unsafe is None
    assert signals_of(row)["injection"] is True


def test_instructions_are_harmless_prompts_and_answers(tmp_path: Path) -> None:
    rows = [{"id": "1", "source": "s", "prompt": "q", "response": "a"}]
    mix = rows_of(tmp_path, rows, kind="instructions")
    examples = [row.example for row in (*mix.fit, *mix.held_out)]
    assert [(e.role, e.text, e.unsafe, e.severity) for e in examples] == [
        ("prompt", "q", False, 0),
        ("response", "a", False, 0),
    ]


def test_an_instruction_without_an_answer_is_named(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="line 1: key 'response' is missing"):
        rows_of(tmp_path, [{"id": "1", "source": "s", "prompt": "q"}], kind="instructions")
