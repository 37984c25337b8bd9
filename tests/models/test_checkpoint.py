"""A checkpoint directory: what is refused, and by which name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import checkpoint
from models.checkpoint import Checkpoint, CheckpointError
from models.guard import COLUMNS, judge
from models.inputs import GuardInput, Turn
from models.text_guard import TextGuard
from tests.checkpoints import tiny_checkpoint


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "tiny")


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / checkpoint.CARD
    card = json.loads(path.read_text("utf-8"))
    change(card)
    path.write_text(json.dumps(card), "utf-8")


def rewrite(directory: Path, name: str, content: bytes) -> None:
    """Another file, with its hash in the card."""
    (directory / name).write_bytes(content)
    digest = checkpoint.sha256(directory / name)
    edit(directory, lambda card: card["hashes"].update({name: digest}))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda card: card.update(taxonomy="other/1"), "taxonomy is 'other/1'"),
        (lambda card: card.update(input_version=99), "input_version is 99"),
        (lambda card: card["calibration"].pop("response"), "calibration lacks the role response"),
        (lambda card: card.update(colour="red"), "colour"),
        (lambda card: card.pop("id"), "id"),
    ],
)
def test_a_card_that_does_not_fit_is_refused_by_the_key(
    directory: Path, change: Callable[[dict[str, Any]], object], fault: str
) -> None:
    edit(directory, change)
    with pytest.raises(CheckpointError, match=r"card\.json") as caught:
        Checkpoint(directory)
    assert fault in str(caught.value)


def test_a_directory_without_a_card(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="name a directory made by"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", [checkpoint.TOKENIZER, checkpoint.ONNX])
def test_a_file_that_was_changed_is_not_read(directory: Path, name: str) -> None:
    path = directory / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(CheckpointError, match="does not have the hash"):
        TextGuard(directory)


@pytest.mark.parametrize("name", [checkpoint.TOKENIZER, checkpoint.ONNX])
def test_a_missing_file_is_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
        TextGuard(directory)


def test_a_file_of_another_format_is_refused(directory: Path) -> None:
    rewrite(directory, checkpoint.ONNX, b"not a model")
    with pytest.raises(CheckpointError, match="not a model that ONNX Runtime reads"):
        TextGuard(directory)


def test_a_calibration_of_another_shape_is_refused(directory: Path) -> None:
    edit(directory, lambda card: card["calibration"]["prompt"].update(scale=[1.0]))
    with pytest.raises(CheckpointError, match=f"prompt: calibration scale must be {COLUMNS}"):
        TextGuard(directory)


class TestTextGuard:
    def test_it_reproduces_its_golden_texts(self, directory: Path) -> None:
        TextGuard(directory).check()

    def test_scores_that_are_off_are_found_at_start(self, directory: Path) -> None:
        golden = json.loads((directory / checkpoint.GOLDEN).read_text("utf-8"))
        golden["cases"][1]["at_least"][0] += 0.2
        rewrite(directory, checkpoint.GOLDEN, json.dumps(golden).encode())
        with pytest.raises(CheckpointError, match=r"golden text 1 differs by 0\.200"):
            TextGuard(directory).check()

    def test_sharing_a_batch_changes_no_verdict(self, directory: Path) -> None:
        guard = TextGuard(directory)
        items = [
            GuardInput("prompt", "how is the bread"),
            GuardInput("response", "it is fine " * 120, (Turn("user", "how is it?"),)),
            GuardInput("prompt", ""),
        ]
        together = judge(guard, items)
        for item, verdict in zip(items, together, strict=True):
            (alone,) = judge(guard, [item])
            np.testing.assert_allclose(alone.at_least, verdict.at_least, atol=0.02)
            assert alone.coverage == verdict.coverage

    def test_a_long_text_has_the_verdict_of_its_worst_window(self, directory: Path) -> None:
        guard = TextGuard(directory)
        item = GuardInput("prompt", "how is the bread and what is it " * 60)
        prepared = guard.prepare(item)
        logits = guard.score(prepared.windows)
        assert len(logits) > 2
        worst = guard.conclude(item, prepared, logits.max(axis=0, keepdims=True))
        assert guard.conclude(item, prepared, logits) == worst

    def test_a_verdict_is_never_made_of_what_is_not_a_number(self, directory: Path) -> None:
        guard = TextGuard(directory)
        item = GuardInput("prompt", "how")
        prepared = guard.prepare(item)
        logits = guard.score(prepared.windows)
        logits[0, 7] = np.nan
        with pytest.raises(ValueError, match="not finite"):
            guard.conclude(item, prepared, logits)
