"""Losses of the guard, as pure functions of tensors. A label that a row lacks is NaN."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


def masked_binary_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    positive_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
) -> Tensor:
    """Mean binary cross-entropy over the entries that are labelled; 0 where none is.

    ``logits`` and ``targets`` have shape (n, columns); a target is a probability or NaN (not
    labelled). ``positive_weight`` of shape (columns,) multiplies the loss of positive entries,
    ``row_weight`` of shape (n,) that of all of a row's.
    """
    labelled = (~torch.isnan(targets)).to(logits.dtype)
    if row_weight is not None:
        labelled = labelled * row_weight.unsqueeze(-1)
    losses = binary_cross_entropy_with_logits(
        logits, torch.nan_to_num(targets), pos_weight=positive_weight, reduction="none"
    )
    return (losses * labelled).sum() / labelled.sum().clamp(min=1e-6)


def distilled(
    logits: Tensor,
    targets: Tensor,
    teacher: Tensor,
    teacher_weight: float,
    positive_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
) -> Tensor:
    """Labels and a teacher's probabilities, blended (arXiv 1503.02531, temperature 1).

    ``teacher`` has the shape of ``targets``, NaN where the teacher says nothing. A row without a
    label learns from the teacher alone, one without a teacher from its labels alone.
    ``positive_weight`` is for labels: a teacher's probabilities carry its own.
    """
    hard = masked_binary_cross_entropy(logits, targets, positive_weight, row_weight)
    soft = masked_binary_cross_entropy(logits, teacher, None, row_weight)
    return (1 - teacher_weight) * hard + teacher_weight * soft


def cumulative_targets(severity: Tensor, unsafe: Tensor) -> Tensor:
    """Targets of P(severity >= 1), P(>= 2), P(>= 3), shape (n, 3).

    ``severity`` is 0 to 3 or NaN; ``unsafe`` is 0, 1 or NaN. A row that only has ``unsafe`` labels
    the first column if it is unsafe, and all three (zero) if it is safe.
    """
    levels = torch.arange(1, 4, dtype=severity.dtype)
    graded = torch.where(
        torch.isnan(severity).unsqueeze(-1),
        torch.full_like(severity, torch.nan).unsqueeze(-1),
        (severity.unsqueeze(-1) >= levels).to(severity.dtype),
    )
    only_flag = torch.isnan(severity) & ~torch.isnan(unsafe)
    first = torch.where(only_flag, unsafe, graded[:, 0])
    rest = torch.where(
        (only_flag & (unsafe == 0)).unsqueeze(-1), torch.zeros_like(graded[:, 1:]), graded[:, 1:]
    )
    return torch.cat([first.unsqueeze(-1), rest], dim=-1)
