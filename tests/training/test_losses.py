"""Losses on literal numbers."""

import math

import pytest
import torch

from training.losses import cumulative_targets, masked_binary_cross_entropy

NAN = math.nan


def test_only_labelled_entries_count() -> None:
    logits = torch.tensor([[0.0, 5.0], [0.0, -5.0]])
    targets = torch.tensor([[1.0, NAN], [0.0, NAN]])
    # -log sigmoid(0) = log 2, for both labelled entries.
    assert masked_binary_cross_entropy(logits, targets).item() == pytest.approx(math.log(2))


def test_no_label_is_no_loss_and_no_gradient() -> None:
    logits = torch.zeros(2, 2, requires_grad=True)
    loss = masked_binary_cross_entropy(logits, torch.full((2, 2), NAN))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(2, 2))


def test_positive_weight_multiplies_positives_alone() -> None:
    logits = torch.zeros(1, 2)
    weight = torch.tensor([3.0, 3.0])
    loss = masked_binary_cross_entropy(logits, torch.tensor([[1.0, 0.0]]), weight)
    # (3 log 2 + log 2) / 2
    assert loss.item() == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize(
    ("severity", "unsafe", "expected"),
    [
        (0.0, 0.0, [0, 0, 0]),
        (1.0, 1.0, [1, 0, 0]),
        (2.0, 1.0, [1, 1, 0]),
        (3.0, 1.0, [1, 1, 1]),
        (NAN, 0.0, [0, 0, 0]),
        (NAN, 1.0, [1, NAN, NAN]),
        (NAN, NAN, [NAN, NAN, NAN]),
        (2.0, NAN, [1, 1, 0]),
    ],
)
def test_cumulative_targets(severity: float, unsafe: float, expected: list[float]) -> None:
    (found,) = cumulative_targets(torch.tensor([severity]), torch.tensor([unsafe]))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), equal_nan=True)
