"""A teacher's scores: computed once, kept by row, blended with the labels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from models.guard import COLUMNS
from models.inputs import InputEncoder
from tests.training.test_guard import base, config
from training import fitting, guard, teacher, teacher_scores
from training.epochs import Epochs
from training.guard_recipe import training_rows
from training.labelled import LabelError
from training.losses import distilled, masked_binary_cross_entropy

__all__ = ["base"]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:onnx")


def test_rows_are_scored_once_and_the_student_reads_them(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = config(base, tmp_path / "data", epochs=1)
    guard.run(recipe, tmp_path / "teacher")
    asked = recipe.model_copy(update={"teacher": tmp_path / "teacher"})
    found = teacher.run(asked, tmp_path / "scores")
    assert found["rows"] == found["scored"] > 0

    monkeypatch.setattr(teacher, "network_logits", lambda *_: pytest.fail("scored again"))
    assert teacher.run(asked, tmp_path / "scores") == found

    path = tmp_path / "scores" / teacher.SCORES
    student = recipe.model_copy(update={"teacher_scores": path})
    rows = training_rows(student)
    assert {row.key for row in rows.questions()} == set(teacher_scores.read(path))
    epochs = Epochs(student, rows, InputEncoder(fitting.base_tokenizer(str(base))))
    _, batch = next(epochs.batches(0))
    assert not torch.isnan(batch.teacher).any()
    assert torch.all((batch.teacher >= 0) & (batch.teacher <= 1))


def test_a_row_that_waits_for_a_teacher_is_left_out_without_one(base: Path, tmp_path: Path) -> None:
    recipe = config(base, tmp_path / "data")
    (mix,) = recipe.mixes
    waiting = [source.model_copy(update={"labels": "teacher"}) for source in mix.sources]
    recipe = recipe.model_copy(
        update={"mixes": (mix.model_copy(update={"sources": tuple(waiting)}),)}
    )
    rows = training_rows(recipe)
    assert rows.mix.fit
    encoder = InputEncoder(fitting.base_tokenizer(str(base)))
    assert not Epochs(recipe, rows, encoder).rows


def test_a_recipe_without_a_teacher_cannot_be_scored(base: Path, tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="names no teacher"):
        teacher.run(config(base, tmp_path / "data"), tmp_path)


def test_unscored_rows_have_no_probabilities() -> None:
    known = {b"a": np.zeros(COLUMNS, np.float16)}
    found = teacher_scores.probabilities([b"a", b"b"], known)
    assert found[0].tolist() == [0.5] * COLUMNS
    assert np.isnan(found[1]).all()


@pytest.mark.parametrize(
    "arrays",
    [
        {"keys": np.zeros((2, 16), np.uint8)},
        {"keys": np.zeros((2, 15), np.uint8), "logits": np.zeros((2, COLUMNS), np.float16)},
        {"keys": np.zeros((2, 16), np.uint8), "logits": np.zeros((3, COLUMNS), np.float16)},
        {"keys": np.zeros((2, 16), np.uint8), "logits": np.zeros((2, 5), np.float16)},
    ],
)
def test_a_file_that_holds_no_scores_is_named(
    tmp_path: Path, arrays: dict[str, np.ndarray]
) -> None:
    save_file(arrays, tmp_path / "t.safetensors")
    with pytest.raises(LabelError, match=r"t\.safetensors"):
        teacher_scores.read(tmp_path / "t.safetensors")


class TestBlend:
    LOGITS = torch.tensor([[0.3, -1.0]])
    NAN = float("nan")

    def loss(self, labels: list[float], soft: list[float], weight: float) -> float:
        return distilled(self.LOGITS, torch.tensor([labels]), torch.tensor([soft]), weight).item()

    def test_without_a_teacher_it_is_the_labels_loss(self) -> None:
        plain = masked_binary_cross_entropy(self.LOGITS, torch.tensor([[1.0, 0.0]])).item()
        assert self.loss([1.0, 0.0], [self.NAN, self.NAN], 0.0) == pytest.approx(plain)

    def test_a_row_without_labels_learns_from_the_teacher_alone(self) -> None:
        soft = masked_binary_cross_entropy(self.LOGITS, torch.tensor([[0.9, 0.2]])).item()
        assert self.loss([self.NAN] * 2, [0.9, 0.2], 0.5) == pytest.approx(0.5 * soft)

    def test_both_are_weighed(self) -> None:
        hard, soft = self.loss([1.0, 0.0], [0.6, 0.4], 0.0), self.loss([1.0, 0.0], [0.6, 0.4], 1.0)
        assert self.loss([1.0, 0.0], [0.6, 0.4], 0.25) == pytest.approx(0.75 * hard + 0.25 * soft)

    def test_a_row_counts_as_its_weight_says(self) -> None:
        logits = torch.tensor([[0.0], [2.0]])
        targets = torch.tensor([[1.0], [0.0]])
        first, second = (
            masked_binary_cross_entropy(logits[n : n + 1], targets[n : n + 1]).item()
            for n in range(2)
        )
        found = masked_binary_cross_entropy(
            logits, targets, row_weight=torch.tensor([3.0, 1.0])
        ).item()
        assert found == pytest.approx((3 * first + second) / 4)
