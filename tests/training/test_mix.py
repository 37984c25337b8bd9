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


LONG = "How would one go about building a small wooden shed behind the old house by the river"


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([prompt(1, "x"), prompt(2, "  ")], "empty"),
        ([prompt(1, LONG), prompt(2, LONG.upper() + "!")], "repeated"),
        ([prompt(1, LONG * 9), prompt(2, LONG * 9 + " once")], "nearly repeated"),
    ],
)
def test_what_is_dropped_is_counted(
    tmp_path: Path, rows: list[dict[str, Any]], reason: str
) -> None:
    mix = rows_of(tmp_path, rows)
    assert len(mix.fit) + len(mix.held_out) == 1
    assert mix.report()["dropped"][reason] == 1


def test_texts_that_one_file_calls_both_safe_and_unsafe_are_all_dropped(tmp_path: Path) -> None:
    rows = [prompt(1, "a b", unsafe=True), prompt(2, "A b!", unsafe=False), prompt(3, "c")]
    mix = rows_of(tmp_path, rows)
    assert [row.example.prompt for row in (*mix.fit, *mix.held_out)] == ["c"]
    assert mix.dropped["contradictory"] == 2


def test_near_copies_with_other_labels_teach_where_the_line_is(tmp_path: Path) -> None:
    rows = [prompt(1, LONG * 9, unsafe=False), prompt(2, LONG * 9 + " burn it", unsafe=True)]
    mix = rows_of(tmp_path, rows)
    assert len(mix.fit) + len(mix.held_out) == 2


def test_equal_short_answers_to_other_questions_stay(tmp_path: Path) -> None:
    rows = [
        prompt(number, question, role="response", response="I am sorry, but no, I can not do that")
        for number, question in enumerate(("how are you", "what is this"))
    ]
    mix = rows_of(tmp_path, rows)
    assert len(mix.fit) + len(mix.held_out) == 2


def test_the_turns_before_are_part_of_a_row(tmp_path: Path) -> None:
    rows = [
        prompt(number, "go on", turns=[{"speaker": "user", "text": text}])
        for number, text in enumerate(("tell me a tale", "tell me a joke"))
    ]
    assert not rows_of(tmp_path, rows).dropped["repeated"]


@pytest.mark.parametrize("role", ["prompt", "response"])
def test_texts_kept_for_evaluation_are_not_taken(tmp_path: Path, role: str) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "d.jsonl").write_text(json.dumps(prompt(1, LONG)) + "\n")
    row = prompt(2, f"Answer this: {LONG}", role=role, response="like so")
    if role == "prompt":
        del row["response"]
    (tmp_path / "f.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(prompt(3, "other")))
    config = MixConfig(
        name="m", licence="x", kept_apart=("dev/*.jsonl",), sources=(Source(file="f.jsonl"),)
    )
    mix = build(tmp_path, [config], 0.5, seed=1)
    assert [found.example.prompt for found in (*mix.fit, *mix.held_out)] == ["other"]
    assert mix.dropped["kept apart for evaluation"] == 1


def test_a_missing_file_of_texts_to_keep_apart_stops_the_run(tmp_path: Path) -> None:
    config = MixConfig(name="m", licence="x", kept_apart=("dev/*.jsonl",), sources=())
    with pytest.raises(LabelError, match="no such file of texts to keep apart"):
        build(tmp_path, [config], 0.5, seed=1)


def test_rows_of_a_source_that_waits_for_a_teacher_have_no_label_of_harm(tmp_path: Path) -> None:
    row = the_only(tmp_path, prompt(1, "x", unsafe=True, severity=2), labels="teacher")
    assert row.needs_teacher
    assert (row.example.unsafe, row.example.severity) == (None, None)


def test_an_excluded_source_is_not_taken(tmp_path: Path) -> None:
    mix = rows_of(tmp_path, [prompt(1, "x"), prompt(2, "y", source="other")], exclude=("other",))
    assert mix.counts() == {"s": 1}


def test_the_projects_own_examples_need_no_data_directory(tmp_path: Path) -> None:
    config = MixConfig(
        name="m", licence="x", sources=(Source(file="written/contrast_pairs.jsonl"),)
    )
    assert len(build(tmp_path, [config], 0.5, seed=1).fit) > 100
