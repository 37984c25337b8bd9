"""The parts of a report, on a few rows whose verdicts are written here."""

from typing import Any

import pytest

from models.taxonomy import CATEGORIES, SIGNALS, Role
from models.verdict import Coverage, Verdict
from training.evaluate import Measured, measure
from training.labelled import Example


def row(number: int, role: Role = "prompt", length: int = 10, **labels: Any) -> Example:
    text = str(number).ljust(length, "x")
    answer = text if role == "response" else None
    labels = {"source": "a", **labels}
    return Example(id=str(number), role=role, prompt=text, response=answer, **labels)


def verdict(unsafe: float, level: int = 1, *names: str, injection: float = 0.0) -> Verdict:
    """Of severity ``level`` where ``unsafe`` is at least 0.5, in the categories ``names``."""
    at_least = tuple(unsafe if level >= k else unsafe / 4 for k in (1, 2, 3))
    signals = tuple(injection if name == "injection" else 0.0 for name in SIGNALS)
    scores = tuple(float(name in names) for name in CATEGORIES)
    minor, moderate, severe = at_least
    return Verdict("prompt", (minor, moderate, severe), scores, signals, Coverage(10, 10, 1))


DRUGS, FORCE = ("drugs",), ("violence",)
ROWS = [
    (row(0, unsafe=True, severity=3, pku_categories=DRUGS), verdict(0.95, 3, "drugs")),
    (row(1, unsafe=True, severity=3, pku_categories=FORCE), verdict(0.85, 1, "drugs", "violence")),
    (row(2, length=200, unsafe=True, severity=1, pku_categories=DRUGS), verdict(0.25)),
    (row(3, length=5000, unsafe=False, severity=0, lang="de"), verdict(0.75, 2, "violence")),
    (row(4, role="response", unsafe=False, severity=0, source="b"), verdict(0.05)),
    (row(5, length=100, categories=("odd",)), verdict(0.95, 3)),
]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    examples, verdicts = zip(*ROWS, strict=True)
    return measure(examples, verdicts).report


def part(report: dict[str, Any], *path: str) -> dict[str, Any]:
    """A part of the report without its intervals."""
    for name in path:
        report = report[name]
    return {
        key: part(value) if isinstance(value, dict) else value
        for key, value in report.items()
        if key != "intervals"
    }


def test_categories_are_over_unsafe_rows(report: dict[str, Any]) -> None:
    assert part(report, "by_category") == {
        "violence": {"n": 1, "f1": 1.0, "precision": 1.0, "recall": 1.0, "flagged": 1.0},
        # One found, one claimed in vain, one missed altogether.
        "drugs": {"n": 2, "f1": 0.5, "precision": 0.5, "recall": 0.5, "flagged": 0.5},
    }


def test_severities_are_over_unsafe_rows(report: dict[str, Any]) -> None:
    assert part(report, "by_severity") == {
        "minor": {"n": 1, "recall": 0.0, "exact": 0.0, "f1": 0.0},
        "severe": {"n": 2, "recall": 1.0, "exact": 0.5, "f1": pytest.approx(2 / 3)},
    }
    assert report["severity_confusion"] == [
        [1, 0, 1, 0],
        [1, 0, 0, 0],
        [0, 0, 0, 0],
        [0, 1, 0, 1],
    ]


def test_groups_are_over_labelled_rows(report: dict[str, Any]) -> None:
    assert part(report, "by_source", "a") == {
        "n": 4,
        "unsafe": 3,
        "f1": pytest.approx(2 / 3),
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 3),
        "fpr": 1.0,
    }
    assert {name: one["n"] for name, one in report["by_role"].items()} == {
        "prompt": 4,
        "response": 1,
    }
    assert {name: one["n"] for name, one in report["by_language"].items()} == {"en": 4, "de": 1}
    assert {name: one["n"] for name, one in report["by_length"].items()} == {
        "1-100": 3,
        "101-300": 1,
        ">4000": 1,
    }
    assert report["language"] == {"en": 5, "de": 1}
    # The only row with a category of its source has no label.
    assert "by_source_category" not in report


def test_false_flags_say_what_was_claimed(report: dict[str, Any]) -> None:
    assert report["false_flags"] == {
        "n": 2,
        "flagged": 1,
        "categories": {"violence": 1},
        "without_category": 0,
        "levels": {"moderate": 1},
    }


def test_the_calibration_curve_has_a_point_for_each_bin_that_has_rows(
    report: dict[str, Any],
) -> None:
    curve = report["calibration_curve"]
    assert {name: (one["n"], one["predicted"], one["observed"]) for name, one in curve.items()} == {
        "0.0-0.1": (1, pytest.approx(0.05), 0.0),
        "0.2-0.3": (1, pytest.approx(0.25), 1.0),
        "0.7-0.8": (1, pytest.approx(0.75), 0.0),
        "0.8-0.9": (1, pytest.approx(0.85), 1.0),
        "0.9-1.0": (1, pytest.approx(0.95), 1.0),
    }


def test_every_figure_has_an_interval_that_holds_it(report: dict[str, Any]) -> None:
    seen = []

    def check(node: Any) -> None:
        if not isinstance(node, dict):
            return
        for name, bounds in node.get("intervals", {}).items():
            seen.append(name)
            if node[name] is None:
                assert bounds is None
            else:
                low, high = bounds
                assert low - 1e-9 <= node[name] <= high + 1e-9, name
        for child in node.values():
            check(child)

    check(report)
    assert {"f1", "auprc", "ece", "severity_qwk", "category_macro_f1", "exact", "observed"} <= {
        *seen
    }


def test_where_the_flag_means_injection_the_signal_is_measured_and_no_harm() -> None:
    examples = [row(0, unsafe=True), row(1, unsafe=True), row(2, unsafe=False, severity=0)]
    verdicts = [verdict(0.0, injection=0.9), verdict(0.9, injection=0.2), verdict(0.9)]
    found: Measured = measure(examples, verdicts, "injection")
    report = found.report
    assert (report["recall"], report["precision"], report["fpr"]) == (0.5, 1.0, 0.0)
    assert report["auprc"] == 1.0
    assert report["severity_mae"] is None
    assert report["positive"] == "injection"
