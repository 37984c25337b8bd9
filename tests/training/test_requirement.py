"""The gate: how a requirement is read, and what it says of a report."""

import pytest

from training.requirement import RequirementError, figures, parse

REPORT = {
    "n": 4,
    "f1": 0.75,
    "fpr": None,
    "positive": "unsafe",
    "by_role": {"prompt": {"f1": 0.5, "intervals": {"f1": [0.1, 0.9]}}},
    "sets": {"llmbar.dev": {"f1": 0.25}},
}


def test_figures_go_by_their_keys() -> None:
    assert figures(REPORT) == {
        "n": 4,
        "f1": 0.75,
        "fpr": None,
        "by_role.prompt.f1": 0.5,
        "sets.llmbar.dev.f1": 0.25,
    }


@pytest.mark.parametrize(
    "text",
    ["f1>=0.75", "f1 >= .75", "f1<=0.75", "f1>0.7", "f1<1", "n>=4", "by_role.prompt.f1>=5e-1"],
)
def test_what_holds_says_nothing(text: str) -> None:
    assert parse(text).failure(figures(REPORT)) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("f1>=0.8", "f1 is 0.75, but must be >= 0.8"),
        ("f1<=0.5", "f1 is 0.75, but must be <= 0.5"),
        ("f1>0.75", "f1 is 0.75, but must be > 0.75"),
        ("fpr<=0.1", "fpr is undefined: the data lacks the rows that it is over"),
    ],
)
def test_what_fails_says_why(text: str, says: str) -> None:
    assert parse(text).failure(figures(REPORT)) == says


@pytest.mark.parametrize("text", ["f1", "f1=0.8", "f1>=", ">=0.8", "f1>=high", "f1>=1.2.3", ""])
def test_what_is_no_requirement_is_refused(text: str) -> None:
    with pytest.raises(RequirementError, match="write a figure"):
        parse(text)


def test_a_figure_that_does_not_exist_is_refused_with_what_is_near() -> None:
    with pytest.raises(
        RequirementError, match=r"no figure by_role.f1; near it are by_role\.prompt"
    ):
        parse("by_role.f1>=0.8").failure(figures(REPORT))
