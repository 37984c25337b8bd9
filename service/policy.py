"""The policy: from a verdict to an action. Pure; a policy file is read once, whole or not at all.

A policy is a list of rules. The first whose direction, categories and least severity match decides;
the last must match everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from models.taxonomy import CATEGORIES, Severity
from models.verdict import Verdict
from service.errors import ConfigurationError
from service.exchange import Direction


class Action(IntEnum):
    """What is done with a text; ordered, so that the strongest of several wins."""

    ALLOW = 0
    ANNOTATE = 1
    REGENERATE = 2
    BLOCK = 3

    @property
    def label(self) -> str:
        """The word that policies, answers and metrics use."""
        return self.name.lower()


def _action(value: object) -> object:
    if isinstance(value, Action):
        return value
    for action in Action:
        if value == action.label:
            return action
    reason = "is not in this release" if value in ("steer", "redact") else "is unknown"
    raise ValueError(f"action {value!r} {reason}: use allow, annotate, regenerate or block")


def _severity(value: object) -> object:
    # A number would be ambiguous: other taxonomies count severities to 6 or 7.
    return value if isinstance(value, Severity) else Severity.from_label(str(value))


def _categories(value: object) -> object:
    if isinstance(value, str) and value != "any":
        raise ValueError(f"categories must be a list, as [{value}], or any")
    return value


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rule(_Part):
    """One line of a policy. ``severity`` is the least level that matches."""

    action: Annotated[Action, BeforeValidator(_action)]
    direction: Literal["prompt", "response", "any"] = "any"
    categories: Annotated[Literal["any"] | tuple[str, ...], BeforeValidator(_categories)] = "any"
    severity: Annotated[Severity, BeforeValidator(_severity)] = Severity.NONE
    review: bool = False
    """Whether somebody should look at what it matches, beside the action."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Rule:
        if self.categories != "any":
            for name in self.categories:
                if name not in CATEGORIES:
                    raise ValueError(f"category {name!r} is unknown: see docs/taxonomy.md")
            if not self.categories:
                raise ValueError("categories is empty: list some, or say any")
            if self.severity is Severity.NONE:
                raise ValueError("no category fires at severity none: say minor or above")
        if self.action is Action.REGENERATE and self.direction != "response":
            raise ValueError("only a response can be regenerated: set direction: response")
        return self

    @property
    def matches_everything(self) -> bool:
        """Whether no verdict in its direction passes it by."""
        return self.categories == "any" and self.severity is Severity.NONE

    def matches(self, direction: Direction, verdict: Verdict) -> bool:
        """Whether this rule speaks of ``verdict``."""
        if self.direction not in ("any", direction) or verdict.level < self.severity:
            return False
        return self.categories == "any" or not set(self.categories).isdisjoint(verdict.categories)


class Stream(_Part):
    """How streams are released.

    ``hold``: what was judged. ``buffer``: the whole answer, once it was judged. ``monitor``: at
    once, to be judged behind, and only told.
    """

    mode: Literal["hold", "buffer", "monitor"] = "hold"
    doubt: float = Field(default=0.06, gt=0, le=1)
    """The severity score from which a piece that was cleared waits for the next one."""
    speculative: bool = True
    """Whether the upstream is asked while the prompt is judged."""


class Regenerate(_Part):
    """Bounds of the regenerate loop, of one request."""

    rounds: int = Field(default=5, ge=0, le=20)
    """Attempts after the first."""
    deadline_seconds: float = Field(default=60.0, gt=0, le=3600)
    max_tokens: int = Field(default=16384, ge=1)
    """Completion tokens of all attempts together; no attempt is begun beyond it."""
    ladder: tuple[Literal["instruct"], ...] = ("instruct",)
    """``instruct``: a new seed, and an instruction that names what was wrong."""


class RefusalText(_Part):
    """What a refused client reads."""

    text: str = "I can't help with that."
    finish_reason: Literal["stop", "content_filter"] = "stop"
    status: Literal[200, 400] = 200
    """Of a blocked prompt: a message, or an error as Azure has it."""


class Recording(_Part):
    """What is remembered of an exchange. Scores always; of its texts the gravest of each side."""

    text: Literal["none", "redacted", "full"] = "none"
    """Whether the text is kept, apart from the scores, and without what names people."""
    sample_passed: float = Field(default=1.0, gt=0, le=1)
    """Share of exchanges where nothing was flagged that leave a record."""


_DEFAULT_RULES: Final = (
    Rule(direction="prompt", severity=Severity.MODERATE, action=Action.BLOCK),
    Rule(direction="prompt", severity=Severity.MINOR, action=Action.ANNOTATE),
    Rule(direction="response", severity=Severity.MINOR, action=Action.REGENERATE),
    Rule(action=Action.ALLOW),
)


class Policy(_Part):
    """A policy, version 1."""

    version: Literal[1] = 1
    id: str = Field(default="default", pattern=r"^[A-Za-z0-9._-]{1,64}$")
    revision: int = Field(default=1, ge=1)
    """Which edition of it this is; a store that policies are published to numbers them."""
    rules: tuple[Rule, ...] = _DEFAULT_RULES
    stream: Stream = Stream()
    context: Literal["latest_turn", "all"] = "latest_turn"
    """Whether an old flagged turn still counts."""
    fail: Literal["closed", "open"] = "closed"
    """What happens to an exchange that no guard could judge."""
    unscannable: Literal["block", "allow"] = "block"
    """What happens to what no guard here can read, such as a file."""
    regenerate: Regenerate = Regenerate()
    refusal: RefusalText = RefusalText()
    record: Recording = Recording()

    @property
    def label(self) -> str:
        """``id@revision``, for records and metrics."""
        return f"{self.id}@{self.revision}"

    @model_validator(mode="after")
    def _ends(self) -> Policy:
        if not self.rules:
            raise ValueError("rules is empty: the last rule must be a default, as {action: allow}")
        last = self.rules[-1]
        if not last.matches_everything or last.direction != "any":
            raise ValueError("the last rule must match everything, as {action: allow}")
        for number, rule in enumerate(self.rules[:-1]):
            if rule.matches_everything and rule.direction == "any":
                raise ValueError(f"rules[{number}] matches everything, so no later rule is reached")
        return self


@dataclass(frozen=True, slots=True)
class Decision:
    """What the policy does with one verdict, and by which rule (its number, from 0)."""

    action: Action
    rule: int
    verdict: Verdict
    review: bool = False
    """Whether that rule asks for somebody to look at it."""


def decide(policy: Policy, direction: Direction, verdict: Verdict) -> Decision:
    """The action of the first rule that matches."""
    for number, rule in enumerate(policy.rules):
        if rule.matches(direction, verdict):
            return Decision(rule.action, number, verdict, rule.review)
    raise AssertionError("the last rule of a policy matches everything")


def strongest(decisions: Iterable[Decision]) -> Decision:
    """The decision that prevails: the strongest action, then the gravest verdict."""
    return max(decisions, key=lambda one: (one.action, one.verdict.severity_score))


def tightened(decision: Decision) -> Decision:
    """The decision of a client that asked for flagged texts to be blocked: never a milder one."""
    is_flagged = decision.verdict.level > Severity.NONE
    if is_flagged and decision.action < Action.REGENERATE:
        return replace(decision, action=Action.BLOCK)
    return decision


def read_policy(path: Path) -> Policy:
    """The policy in a YAML file; ``ConfigurationError`` names the line, the key and the fault."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigurationError(f"policy {path} cannot be read: {reason}") from error
    return parse_policy(text, f"policy {path}")


def parse_policy(text: str, source: str = "the policy") -> Policy:
    """The policy in a text; ``ConfigurationError`` names ``source``, the line, the key and the
    fault.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    # YAML gives a plain ValueError for a date that there is not, and goes down by recursion.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise ConfigurationError(f"{source}{place}: not YAML") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"{source}: expected a mapping with version, id and rules")
    if twice := _key_given_twice(node):
        line, key = twice
        raise ConfigurationError(f"{source}, line {line}: key {key} stands twice")
    if missing := [key for key in ("version", "id", "rules") if key not in values]:
        raise ConfigurationError(f"{source}: key {missing[0]} is missing")
    try:
        return Policy.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        loc = first["loc"]
        keys = [key for key in loc if isinstance(key, int) or key in _WORDS]
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            keys, message = [*loc], "there is no such key"
        name = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
        place = f"{source}, line {_line(node, keys)}" + (name and f": {name.lstrip('.')}")
        raise ConfigurationError(f"{place}: {message}") from None


_WORDS: Final = frozenset(
    name
    for part in (Policy, Rule, Stream, Regenerate, RefusalText, Recording)
    for name in part.model_fields
)


def _key_given_twice(node: yaml.Node | None) -> tuple[int, str] | None:
    """Line and name of a key that its mapping holds already: YAML would keep the later one."""
    stack = [node]
    visited = set()
    while stack:
        part = stack.pop()
        # An alias stands for a node that was met before; it may even hold itself.
        if id(part) in visited:
            continue
        visited.add(id(part))
        match part:
            case yaml.MappingNode(value=pairs):
                seen = set()
                for key, value in pairs:
                    if key.value in seen:
                        return key.start_mark.line + 1, key.value
                    seen.add(key.value)
                    stack.append(value)
            case yaml.SequenceNode(value=items):
                stack += items
    return None


def _line(node: yaml.Node | None, keys: Sequence[Any]) -> int:
    """The line on which the value at ``keys`` begins, as far as the document holds it."""
    line = node.start_mark.line + 1 if node else 1
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            found = [(k, v) for k, v in node.value if k.value == key]
            if not found:
                return line
            line, node = found[0][0].start_mark.line + 1, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line + 1
        else:
            return line
    return line
