"""The recipes that the project ships can be read, and keep what they promise."""

from pathlib import Path

import pytest

from training.guard_recipe import GuardConfig
from training.recipe import read_recipe

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
RECIPES = ("guard.yaml", "teacher.yaml", "judge.yaml", "guard_joint.yaml")


def recipe(name: str) -> GuardConfig:
    return read_recipe(CONFIGS / name, [], GuardConfig)


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_can_be_read(name: str) -> None:
    assert recipe(name).mixes


def test_the_default_guard_and_its_judge_have_no_source_in_common() -> None:
    (permissive,), (research,) = recipe("guard.yaml").mixes, recipe("judge.yaml").mixes
    files = [{source.file for source in mix.sources} for mix in (permissive, research)]
    assert not files[0] & files[1]
    assert not permissive.licences.keys() & research.licences.keys()


def test_the_default_guard_saw_no_non_commercial_source() -> None:
    (permissive,) = recipe("guard.yaml").mixes
    assert permissive.licence == recipe("guard.yaml").licence == "Apache-2.0"
    assert not [name for name, licence in permissive.licences.items() if "NC" in licence]
    assert not [source.file for source in permissive.sources if "research" in source.file]


def test_the_teacher_saw_what_its_student_may_see() -> None:
    assert recipe("teacher.yaml").mixes == recipe("guard.yaml").mixes


def test_every_mix_keeps_evaluation_texts_apart() -> None:
    for name in RECIPES:
        for mix in recipe(name).mixes:
            assert {"kept_back.hashes.gz", "dev/*.jsonl"} <= set(mix.kept_apart)
