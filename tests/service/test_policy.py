"""The policy: which action a verdict leads to, and which files are not a policy."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from models.taxonomy import CATEGORIES, Severity
from models.verdict import Verdict, nothing
from service.errors import ConfigurationError
from service.exchange import Direction
from service.policy import Action, Decision, Policy, Rule, decide, read_policy, strongest

NONE, MINOR, MODERATE, SEVERE = Severity
ALLOW, ANNOTATE, REGENERATE, BLOCK = Action


def verdict(level: Severity, *categories: str, direction: Direction = "prompt") -> Verdict:
    """A verdict of ``level`` in which ``categories`` fire."""
    return replace(
        nothing(direction),
        at_least=cast("tuple[float, float, float]", tuple(float(n < level) for n in range(3))),
        category_scores=tuple(float(name in categories) for name in CATEGORIES),
    )


def policy(*rules: dict[str, Any]) -> Policy:
    return Policy.model_validate({"rules": [*rules, {"action": "allow"}]})


@pytest.mark.parametrize(
    ("direction", "level", "action"),
    [
        ("prompt", NONE, ALLOW),
        ("prompt", MINOR, ANNOTATE),
        ("prompt", MODERATE, BLOCK),
        ("prompt", SEVERE, BLOCK),
        ("response", NONE, ALLOW),
        ("response", MINOR, REGENERATE),
        ("response", MODERATE, REGENERATE),
        ("response", SEVERE, REGENERATE),
    ],
)
def test_the_built_in_policy(direction: Direction, level: Severity, action: Action) -> None:
    assert decide(Policy(), direction, verdict(level)).action is action


class TestMatching:
    @pytest.mark.parametrize(
        ("rule", "direction", "found", "matches"),
        [
            # The least severity.
            ({"severity": "moderate"}, "prompt", verdict(MINOR), False),
            ({"severity": "moderate"}, "prompt", verdict(MODERATE), True),
            ({"severity": "moderate"}, "prompt", verdict(SEVERE), True),
            ({}, "response", verdict(NONE), True),
            # The direction.
            ({"direction": "prompt"}, "prompt", verdict(NONE), True),
            ({"direction": "prompt"}, "response", verdict(SEVERE), False),
            ({"direction": "any", "severity": "minor"}, "response", verdict(SEVERE), True),
            # Any one of the categories, where it fires.
            ({"categories": ["drugs"]}, "prompt", verdict(SEVERE, "drugs", "violence"), True),
            ({"categories": ["drugs"]}, "prompt", verdict(SEVERE, "violence"), False),
            ({"categories": ["drugs", "violence"]}, "prompt", verdict(MINOR, "violence"), True),
            ({"categories": ["drugs"]}, "prompt", verdict(SEVERE), False),
            # A category never fires where the level is none.
            ({"categories": ["drugs"]}, "prompt", verdict(NONE, "drugs"), False),
            # All of them together.
            (
                {"categories": ["drugs"], "severity": "severe", "direction": "response"},
                "response",
                verdict(MODERATE, "drugs"),
                False,
            ),
        ],
    )
    def test_a_rule_speaks_of_a_verdict(
        self, rule: dict[str, Any], direction: Direction, found: Verdict, matches: bool
    ) -> None:
        if "categories" in rule:
            rule = {"severity": "minor"} | rule
        made = policy({"action": "block", **rule}) if rule else policy()
        if rule:
            decision = decide(made, direction, found)
            assert (decision.action is BLOCK, decision.rule) == (matches, 0 if matches else 1)
        else:
            assert made.rules[0].matches(direction, found) is matches

    def test_the_first_rule_that_matches_decides(self) -> None:
        made = policy(
            {"action": "annotate", "categories": ["drugs"], "severity": "minor"},
            {"action": "block", "severity": "minor"},
        )
        assert decide(made, "prompt", verdict(SEVERE, "drugs")).action is ANNOTATE
        assert decide(made, "prompt", verdict(SEVERE, "violence")).action is BLOCK

    def test_a_rule_may_ask_for_review_beside_any_action(self) -> None:
        made = policy(
            {"action": "block", "severity": "severe", "review": True},
            {"action": "annotate", "severity": "minor"},
            {"action": "allow", "direction": "response", "review": True},
        )
        asked = [
            decide(made, "prompt", verdict(SEVERE)),
            decide(made, "prompt", verdict(MINOR)),
            decide(made, "response", verdict(NONE)),
            decide(made, "prompt", verdict(NONE)),
        ]
        assert [(one.action, one.review) for one in asked] == [
            (BLOCK, True),
            (ANNOTATE, False),
            (ALLOW, True),
            (ALLOW, False),
        ]

    @settings(deadline=None)
    @given(
        st.sampled_from(["prompt", "response"]),
        st.sampled_from(Severity),
        st.sets(st.sampled_from(CATEGORIES)),
    )
    def test_each_verdict_has_a_decision_by_a_rule_that_matches(
        self, direction: Direction, level: Severity, categories: set[str]
    ) -> None:
        made = policy(
            {"action": "block", "categories": ["violence"], "severity": "severe"},
            {"action": "regenerate", "direction": "response", "severity": "moderate"},
            {"action": "annotate", "categories": list(CATEGORIES[:4]), "severity": "minor"},
        )
        found = verdict(level, *categories)
        decision = decide(made, direction, found)
        assert made.rules[decision.rule].matches(direction, found)
        assert not any(rule.matches(direction, found) for rule in made.rules[: decision.rule])
        assert decision == Decision(made.rules[decision.rule].action, decision.rule, found)


def test_the_strongest_action_prevails_and_then_the_gravest_verdict() -> None:
    annotated = Decision(ANNOTATE, 0, verdict(SEVERE))
    blocked, worse = Decision(BLOCK, 1, verdict(MINOR)), Decision(BLOCK, 2, verdict(MODERATE))
    assert strongest([annotated, blocked]) is blocked
    assert strongest([blocked, worse, annotated]) is worse


FILE = """\
version: 1
id: strict
# Comments and order are free.
refusal:
  text: No.
  finish_reason: content_filter
rules:
  - {direction: prompt, categories: [violence, drugs], severity: minor, action: block}
  - action: regenerate
    direction: response
    severity: minor
  - action: allow
regenerate: {rounds: 2, deadline_seconds: 10, max_tokens: 500, ladder: [instruct]}
fail: open
context: all
stream: {mode: buffer}
record: {text: none, sample_passed: 0.1}
"""


def file_of(directory: Path, content: str | bytes) -> Path:
    file = directory / "policy.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


class TestFile:
    def test_it_is_read_whole(self, tmp_path: Path) -> None:
        made = read_policy(file_of(tmp_path, FILE))
        assert made.rules[0] == Rule(
            direction="prompt", categories=("violence", "drugs"), severity=MINOR, action=BLOCK
        )
        assert [rule.action for rule in made.rules] == [BLOCK, REGENERATE, ALLOW]
        assert (made.id, made.fail, made.context) == ("strict", "open", "all")
        assert (made.refusal.text, made.refusal.finish_reason) == ("No.", "content_filter")
        assert (made.regenerate.rounds, made.regenerate.max_tokens) == (2, 500)
        assert made.record.sample_passed == 0.1

    @pytest.mark.parametrize(
        ("old", "new", "line", "says"),
        [
            ("version: 1", "version: 2", 1, "version"),
            ("id: strict", "id: a b", 2, "id"),
            ("id: strict", "idd: strict", None, "id is missing"),
            ("fail: open", "fail: ajar", 14, "fail"),
            ("fail: open", "fial: open", 14, "fial"),
            ("finish_reason: content_filter", "reason: content_filter", 6, "refusal.reason"),
            ("rounds: 2", "rounds: 21", 13, "regenerate.rounds"),
            ("rounds: 2", "rounds: two", 13, "regenerate.rounds"),
            ("ladder: [instruct]", "ladder: [pray]", 13, "regenerate.ladder"),
            ("sample_passed: 0.1", "sample_passed: 0", 17, "record.sample_passed"),
            ("text: none", "text: some", 17, "record.text"),
            ("action: block", "action: explode", 8, "'explode'"),
            ("action: block", "action: steer", 8, "not in this release"),
            ("action: block", "action: 3", 8, "rules[0].action"),
            ("action: block", "acton: block", 8, "action"),
            ("severity: minor, ", "severity: high, ", 8, "'high'"),
            ("severity: minor, ", "severity: 1, ", 8, "rules[0].severity"),
            ("severity: minor, ", "severity: none, ", 8, "minor"),
            ("severity: minor, ", "serverity: minor, ", 8, "serverity"),
            ("severity: minor, ", "severity: minor, review: maybe, ", 8, "rules[0].review"),
            ("[violence, drugs]", "[violance]", 8, "'violance'"),
            ("[violence, drugs]", "violence", 8, "[violence]"),
            ("[violence, drugs]", "[]", 8, "categories"),
            ("direction: prompt", "direction: both", 8, "rules[0].direction"),
            ("direction: response", "direction: prompt", 9, "direction: response"),
            ("  - action: allow\n", "", 1, "last rule"),
            ("  - action: allow", "  - {action: allow, direction: prompt}", 1, "last rule"),
            ("  - action: allow", "  - action: allow\n  - action: block", 1, "rules[2]"),
            ("fail: open", "fail: open\nrules: [{action: allow}]", 15, "rules stands twice"),
            ("rounds: 2", "rounds: 2, rounds: 5", 13, "rounds stands twice"),
            ("id: strict", "id: [", None, "not YAML"),
            ("id: strict", "id: 2026-13-45", None, "not YAML"),
        ],
    )
    def test_what_is_wrong_is_named_by_line_and_key(
        self, tmp_path: Path, old: str, new: str, line: int | None, says: str
    ) -> None:
        assert FILE.count(old) == 1
        with pytest.raises(ConfigurationError) as refused:
            read_policy(file_of(tmp_path, FILE.replace(old, new)))
        (message,) = str(refused.value).splitlines()
        assert "policy.yaml" in message
        assert says in message
        if line is not None:
            assert f"line {line}:" in message

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("", "mapping"),
            ("- action: allow", "mapping"),
            ("version: 1\nid: a", "rules is missing"),
            ("version: 1\nid: a\nrules: []", "rules"),
            ("version: 1\nid: a\nrules: allow", "rules"),
            ("version: 1\nid: a\nrules: [allow]", "rules[0]"),
            (b"id: \xff", "UTF-8"),
        ],
    )
    def test_what_is_no_policy_at_all_is_refused(
        self, tmp_path: Path, content: str | bytes, says: str
    ) -> None:
        with pytest.raises(ConfigurationError, match=r"policy\.yaml") as refused:
            read_policy(file_of(tmp_path, content))
        assert says in str(refused.value)

    def test_a_file_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="gone"):
            read_policy(tmp_path / "gone.yaml")


def test_a_policy_is_frozen() -> None:
    made = Policy()
    with pytest.raises(ValidationError, match="frozen"):
        made.fail = "open"  # type: ignore[misc]
