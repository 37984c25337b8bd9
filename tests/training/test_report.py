"""Tables, Markdown and plots of a report."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.guards import WordGuard
from training import tables
from training.evaluate import evaluate
from training.labelled import Example
from training.streams import stream
from training.suite import EvaluationSet, LongTexts, Suite


def example(number: int, text: str, unsafe: bool, severity: int, *categories: str) -> Example:
    return Example(
        id=str(number),
        source=f"s{number % 2}",
        role="prompt",
        prompt=text,
        unsafe=unsafe,
        severity=severity,
        pku_categories=categories,
    )


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    rows = (
        example(0, "severe-violence", True, 3, "violence"),
        example(1, "minor-drugs", True, 2, "drugs"),
        example(2, "the weather", False, 0),
        example(3, "minor-drugs again", False, 0),
    )
    answer = Example(
        id="r", source="s", role="response", prompt="q", response="Severe. Fine.", unsafe=True
    )
    suite = Suite(
        "mine",
        (EvaluationSet("ours", "prompt", "unsafe", rows),),
        prompts=rows,
        long_texts=LongTexts(("the weather.",), ("severe-violence",), (100, 1000), 2),
        streams=(stream(answer, 7),),
    )
    return evaluate(WordGuard(), suite, lambda *_: lambda _: None, threads=1)


@pytest.mark.parametrize(
    ("value", "bounds", "shown"),
    [
        (0.8462, [0.812, 0.881], "84.6 (81–88)"),
        (1.0, [1.0, 1.0], "100 (100–100)"),
        (-0.2, [-0.38, 0.05], "-20.0 (-38 to 5)"),
        (None, None, "–"),
    ],
)
def test_a_cell_is_a_percentage_with_its_interval(value: Any, bounds: Any, shown: str) -> None:
    assert tables.cell({"f1": value, "intervals": {"f1": bounds}}, "f1") == shown


def test_kappa_is_no_percentage() -> None:
    node = {"severity_qwk": 0.456, "intervals": {"severity_qwk": [0.4, 0.5]}}
    assert tables.cell(node, "severity_qwk") == "0.46 (0.40–0.50)"


def test_rows_fit_their_columns(result: dict[str, Any]) -> None:
    shown = [*tables.suite_tables(result), *tables.set_tables("ours", result["sets"]["ours"])]
    assert len({one.title for one in shown}) == len(shown)
    for one in shown:
        assert one.rows, one.title
        assert {len(row) for row in one.rows} == {len(one.columns)}, one.title


def test_a_table_of_one_group_is_left_out(result: dict[str, Any]) -> None:
    titles = [one.title for one in tables.set_tables("ours", result["sets"]["ours"])]
    assert "By source" in titles
    assert "By role" not in titles
    assert "False flags: 1 of 2 harmless rows" in titles


def test_the_report_is_written_as_json_markdown_and_plots(
    result: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra 'report'")
    from training import report

    report.write(result, tmp_path / "new" / "report")

    written = tmp_path / "new" / "report"
    assert json.loads((written / "report.json").read_text("utf-8")) == result
    text = (written / "report.md").read_text("utf-8")
    assert text.startswith("# words-1 on the suite mine\n")
    assert "\n## Robustness: 4 prompts, 2 of them harmful\n" in text
    assert "\n### By severity, over unsafe rows\n" in text
    plots = {path.name for path in written.glob("*.png")}
    assert plots == {
        "calibration.png", "categories.png", "long_texts.png", "robustness.png", "sets.png",
        "severity.png",
    }  # fmt: skip
    for name in plots:
        assert f"({name})" in text
        assert (written / name).read_bytes().startswith(b"\x89PNG")
