"""The names, and that every mapping speaks of names that exist."""

from collections.abc import Mapping

import pytest

from models import taxonomy
from models.taxonomy import CATEGORIES, SIGNALS, Severity, evaluate

NAMES = {*CATEGORIES, *SIGNALS, "severity:minor", "severity:moderate", "severity:severe"}
OPENAI_KEYS = {
    "harassment", "harassment/threatening", "hate", "hate/threatening", "illicit",
    "illicit/violent", "self-harm", "self-harm/intent", "self-harm/instructions", "sexual",
    "sexual/minors", "violence", "violence/graphic",
}  # fmt: skip


def test_there_are_19_categories_and_4_severities() -> None:
    assert len(CATEGORIES) == len(set(CATEGORIES)) == 19
    assert [level.label for level in Severity] == ["none", "minor", "moderate", "severe"]
    assert [Severity.from_label(level.label) for level in Severity] == list(Severity)
    with pytest.raises(ValueError, match="use none, minor, moderate or severe"):
        Severity.from_label("grave")


def test_pku_saferlhf_names_our_categories_in_their_order() -> None:
    assert tuple(taxonomy.PKU_SAFERLHF.values()) == CATEGORIES


def test_every_openai_key_is_an_expression_of_our_names() -> None:
    assert set(taxonomy.OPENAI) == OPENAI_KEYS
    for mapping in (taxonomy.OPENAI, taxonomy.AZURE):
        for expression in mapping.values():
            assert {name for group in expression for name in group} <= NAMES


@pytest.mark.parametrize(
    ("mapping", "size"),
    [
        (taxonomy.MLCOMMONS, 14),
        (taxonomy.BEAVERTAILS, 14),
        (taxonomy.BEAVERTAILS_V, 20),
        (taxonomy.QWEN3GUARD, 9),
    ],
)
def test_every_source_maps_to_our_categories(
    mapping: Mapping[str, tuple[str, ...]], size: int
) -> None:
    assert len(mapping) == size
    assert {name for names in mapping.values() for name in names} <= set(CATEGORIES)


def test_a_key_holds_when_every_group_does_and_a_group_when_any_of_its_names_does() -> None:
    scores = {"a": 0.2, "b": 0.9, "c": 0.6}
    assert evaluate((("a", "b"),), scores) == 0.9
    assert evaluate((("a", "b"), ("c",)), scores) == 0.6
