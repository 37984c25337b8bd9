"""Rows as padded tensors, in batches of like length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from models.guard import Logits, score_all
from models.inputs import Window
from models.network import GuardNetwork

LENGTH_STEP: Final = 32


class Batch:
    """Windows padded to a common length: int64 tensors of shape (n, length)."""

    def __init__(self, windows: Sequence[Window]) -> None:
        shape = (len(windows), max(map(padded_length, windows)))
        self.input_ids = torch.zeros(shape, dtype=torch.int64)
        self.attention_mask = torch.zeros(shape, dtype=torch.int64)
        self.token_type_ids = torch.zeros(shape, dtype=torch.int64)
        for row, window in enumerate(windows):
            length = len(window)
            self.input_ids[row, :length] = torch.tensor(window.token_ids)
            self.attention_mask[row, :length] = 1
            self.token_type_ids[row, window.context_length : length] = 1

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """In the order of ``GuardNetwork.forward``."""
        tensors = (self.input_ids, self.attention_mask, self.token_type_ids)
        first, second, third = (tensor.to(device) for tensor in tensors)
        return first, second, third


def epoch_batches(windows: Sequence[Window], token_budget: int, seed: int) -> list[list[int]]:
    """All rows once, in batches of like length, in random order.

    Lengths are taken in steps of ``LENGTH_STEP``, so that few shapes occur: the CPU kernels are
    compiled anew for each.
    """
    generator = np.random.default_rng(seed)
    of_length: dict[int, list[int]] = {}
    for row in generator.permutation(len(windows)):
        of_length.setdefault(padded_length(windows[row]), []).append(int(row))
    batches = [
        rows[start : start + token_budget // length]
        for length, rows in sorted(of_length.items())
        for start in range(0, len(rows), token_budget // length)
    ]
    return [batches[index] for index in generator.permutation(len(batches))]


def padded_length(window: Window) -> int:
    """The length of ``window``, rounded up to the next step."""
    return -(-len(window) // LENGTH_STEP) * LENGTH_STEP


@torch.no_grad()
def network_logits(guard: GuardNetwork, windows: Sequence[Window]) -> Logits:
    """Logits of all windows in float32, shape (n, ``COLUMNS``)."""
    guard.eval()
    device = next(guard.parameters()).device

    def score(batch: Sequence[Window]) -> Logits:
        logits: Logits = guard(*Batch(batch).inputs(device)).float().cpu().numpy()
        return logits

    return score_all(score, windows)
