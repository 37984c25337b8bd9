"""Losses of the guard, as pure functions of tensors. A label that a row lacks is NaN."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


def masked_binary_cross_entropy(
    logits: Tensor, targets: Tensor, positive_weight: Tensor | None = None
) -> Tensor:
    """Mean binary cross-entropy over the entries that are labelled; 0 where none is.

    ``logits`` and ``targets`` have shape (n, columns); a target is 0, 1 or NaN (not labelled).
    ``positive_weight`` of shape (columns,) multiplies the loss of positive entries.
    """
    labelled = ~torch.isnan(targets)
    losses = binary_cross_entropy_with_logits(
        logits,
        torch.where(labelled, targets, torch.zeros_like(targets)),
        pos_weight=positive_weight,
        reduction="none",
    )
    return (losses * labelled).sum() / labelled.sum().clamp(min=1)


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
