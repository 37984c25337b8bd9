"""Reports and recipes."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from models.guard import judge
from tests.guards import WordGuard
from training.evaluate import judge_examples, report
from training.labelled import Example
from training.recipe import RecipeError, read_recipe

KEYS = {
    "n", "f1", "precision", "recall", "fpr", "auprc", "ece", "severity_qwk",
    "severity_qwk_unsafe", "severity_macro_f1_unsafe", "severity_mae", "severe_to_none_rate",
    "category_micro_f1", "category_macro_f1", "refusal_f1", "language",
}  # fmt: skip


def example(text: str, **labels: Any) -> Example:
    return Example(id="1", source="s", role="prompt", prompt=text, **labels)


EXAMPLES = [
    example("severe-violence", unsafe=True, severity=3, pku_categories=("violence",)),
    example("minor-drugs", unsafe=True, severity=2, pku_categories=("drugs", "violence")),
    example("fine", unsafe=False, severity=0, lang="fr"),
    example("minor-drugs again", unsafe=False, severity=0),
    example("no label"),
]


def test_a_report_has_every_figure_over_the_rows_that_carry_its_label() -> None:
    guard = WordGuard()
    result = report(EXAMPLES, judge_examples(guard, EXAMPLES))
    assert set(result) == KEYS
    assert result["n"] == 5
    assert result["precision"] == pytest.approx(2 / 3, abs=1e-3)
    assert result["recall"] == 1.0
    assert result["fpr"] == 0.5
    assert result["severity_mae"] == pytest.approx((0 + 1 + 0 + 1) / 4)
    # Three labels in two unsafe rows, two of them found.
    assert result["category_micro_f1"] == pytest.approx(2 * 2 / (3 + 2), abs=1e-3)
    assert result["refusal_f1"] is None
    assert result["language"] == {"en": 4, "fr": 1}


def test_a_file_without_a_class_reports_null() -> None:
    harmful = EXAMPLES[:2]
    guard = WordGuard()
    result = report(harmful, judge(guard, [one.guard_input() for one in harmful]))
    assert result["fpr"] is None
    assert result["auprc"] is None
    assert result["f1"] == 1.0


def test_progress_adds_up() -> None:
    done: list[int] = []
    judge_examples(WordGuard(), EXAMPLES * 100, done.append)
    assert sum(done) == 500
    assert len(done) > 1


class Recipe(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rate: float
    name: str = "x"


def test_a_recipe_with_a_key_replaced(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("rate: 0.1\n", "utf-8")
    assert read_recipe(path, ["rate=0.5", "name=y"], Recipe) == Recipe(rate=0.5, name="y")


@pytest.mark.parametrize(
    ("content", "changes", "fault"),
    [
        ("rate: fast", [], "rate"),
        ("rate: 1\ncolour: red", [], "colour"),
        ("rate: 1", ["colour=red"], "colour"),
        ("rate: 1", ["rate"], "write key=value"),
        ("- 1", [], "expected a mapping"),
        ("a: [", [], "not YAML"),
    ],
)
def test_a_faulty_recipe_names_the_key(
    tmp_path: Path, content: str, changes: list[str], fault: str
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(content, "utf-8")
    with pytest.raises(RecipeError, match=fault):
        read_recipe(path, changes, Recipe)
