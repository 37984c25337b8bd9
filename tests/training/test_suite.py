"""Suites: which rows of which files, always the same ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.guards import WordGuard
from training.evaluate import evaluate
from training.labelled import LabelError
from training.recipe import RecipeError, read_recipe
from training.split import CALIBRATION_SHARE, position
from training.suite import DEFAULT_SUITE, SuiteConfig, files_as_suite, read_suite, sample


def rows(count: int, role: str = "prompt", **labels: Any) -> list[dict[str, Any]]:
    answer = {"response": "Fine. It is fine."} if role == "response" else {}
    return [
        {"id": f"{role}{n}", "source": "s", "role": role, "prompt": f"text {n}"} | answer | labels
        for n in range(count)
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    harmful = rows(1, unsafe=True)
    harmful[0]["prompt"] = "severe-violence again"
    files = {
        "mixed": [*rows(40, unsafe=False), *rows(20, "response", unsafe=True), *harmful],
        "harmless": rows(10, unsafe=False),
        "plain": [{"id": "1", "prompt": "a question", "response": "The answer. It is long."}],
        "harmful": harmful,
        "ends": [{"id": f"response{n}", "first_harmful_end": 5} for n in range(20)],
    }
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)), "utf-8")
    return tmp_path


def suite_file(directory: Path, **changes: Any) -> Path:
    sets = [{"name": "one", "file": "mixed.jsonl", "group": "prompt"}]
    path = directory / "suite.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "sets": sets} | changes), "utf-8")
    return path


def one_set(**keys: Any) -> dict[str, Any]:
    return {"sets": [{"name": "one", "file": "mixed.jsonl", "group": "prompt"} | keys]}


def test_a_set_takes_the_half_that_calibration_never_reads(data: Path) -> None:
    (evaluation,) = read_suite(suite_file(data), data).sets
    (whole,) = read_suite(suite_file(data, **one_set(half="whole")), data).sets
    assert len(whole.examples) == 61
    assert 0 < len(evaluation.examples) < 61
    reported = [one for one in whole.examples if position(one.prompt) >= CALIBRATION_SHARE]
    assert list(evaluation.examples) == reported


def test_a_set_takes_one_role_and_at_most_its_limit_always_the_same(data: Path) -> None:
    path = suite_file(data, **one_set(half="whole", role="response", limit=7))
    first, again = read_suite(path, data).sets[0], read_suite(path, data).sets[0]
    assert len(first.examples) == 7
    assert {example.role for example in first.examples} == {"response"}
    assert first == again


def test_a_sample_keeps_the_order() -> None:
    items = list(range(100))
    assert sample(items, None, 0) == sample(items, 100, 0) == items
    assert sample(items, 10, 0) == sorted(sample(items, 10, 0))
    assert sample(items, 10, 0) != sample(items, 10, 1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"colour": "red"}, "colour"),
        ({"sets": []}, "sets"),
        (one_set(group="odd"), "group"),
        (one_set(half="third"), "half"),
        (one_set(limit=0), "limit"),
        (one_set(name="two words"), "name"),
        ({"sets": 2 * one_set()["sets"]}, "two sets are called 'one'"),
    ],
)
def test_a_faulty_suite_names_the_key(data: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        read_suite(suite_file(data, **changes), data)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (one_set(file="gone.jsonl"), "gone.jsonl cannot be read"),
        (one_set(file="harmless.jsonl", role="response"), "no row for the set one"),
        (
            {
                "streams": {
                    "file": "mixed.jsonl",
                    "first_harmful": "harmless.jsonl",
                    "limit": 3,
                }
            },
            "harmless.jsonl, line 1: needs an id and a whole first_harmful_end",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_named(data: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(LabelError, match=says):
        read_suite(suite_file(data, **changes), data)


def test_all_that_a_suite_asks_for_is_measured(data: Path) -> None:
    path = suite_file(
        data,
        sets=[
            {"name": "all", "file": "mixed.jsonl", "group": "prompt", "half": "whole"},
            {"name": "none", "file": "harmless.jsonl", "group": "harmless", "half": "whole"},
        ],
        robustness={"limit": 10},
        long_texts={
            "harmless": "plain.jsonl",
            "harmful": "harmful.jsonl",
            "lengths": [100],
            "documents": 2,
            "half": "whole",
        },
        streams={
            "file": "mixed.jsonl",
            "first_harmful": "ends.jsonl",
            "half": "whole",
            "limit": 5,
        },
    )
    parts: dict[str, list[int]] = {}

    def bars(name: str, total: int) -> Any:
        parts[name] = [total]
        return parts[name].append

    result = evaluate(WordGuard(), read_suite(path, data), bars)
    assert [*result] == ["guard", "suite", "sets", "means", "robustness", "long_texts", "streams"]
    assert [*result["sets"]] == ["all", "none"]
    assert result["sets"]["all"]["n"] == 61
    # The one harmful prompt is found, the twenty answers are not.
    assert result["sets"]["all"]["recall"] == pytest.approx(1 / 21, abs=1e-4)
    assert result["means"]["prompt_f1"] == result["sets"]["all"]["f1"]
    assert result["means"]["harmless_fpr"] == 0.0
    assert (result["robustness"]["n"], result["robustness"]["unsafe"]) == (6, 1)
    assert result["long_texts"]["100"]["found"] == 1.0
    assert result["streams"]["harmful"] == 5
    assert all(total == sum(done) for total, *done in parts.values())


def test_means_are_over_the_sets_of_a_group(data: Path) -> None:
    sets = [
        {"name": name, "file": f"{file}.jsonl", "group": group, "half": "whole", "role": "prompt"}
        for name, file, group in (
            ("a", "mixed", "prompt"),
            ("b", "harmful", "prompt"),
            ("c", "harmless", "prompt"),
            ("d", "harmless", "harmless"),
        )
    ]
    result = evaluate(
        WordGuard(), read_suite(suite_file(data, sets=sets), data), lambda *_: lambda _: None
    )
    # F1 is undefined where nothing is harmful: that set is left out.
    assert result["means"]["prompt_f1"] == 1.0
    assert result["means"].keys() == {"prompt_f1", "harmless_fpr", "intervals"}


def test_files_are_sets_of_their_own(data: Path) -> None:
    suite = files_as_suite([data / "harmless.jsonl", data / "mixed.jsonl"])
    assert [(one.name, one.group) for one in suite.sets] == [
        ("harmless", "prompt"),
        ("mixed", None),
    ]
    with pytest.raises(LabelError, match="two files are called mixed"):
        files_as_suite([data / "mixed.jsonl"] * 2)


def test_the_shipped_suite_reports_nothing_that_calibration_reads() -> None:
    config = read_recipe(DEFAULT_SUITE, [], SuiteConfig)
    assert {one.group for one in config.sets} == {"prompt", "response", "harmless", "injection"}
    assert {one.name for one in config.sets if one.half == "whole"} == {"deepset_injection"}
    assert not any(one.file.is_absolute() for one in config.sets)
