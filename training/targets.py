"""What the labels of rows ask of each column of a guard's logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.guard import CATEGORY_COLUMNS, COLUMNS, SEVERITY_COLUMNS, SIGNAL_COLUMNS
from models.taxonomy import CATEGORIES
from training.losses import cumulative_targets
from training.mix import Row

Targets = NDArray[np.float32]


def label_matrix(rows: Sequence[Row]) -> Targets:
    """Targets of shape (rows, ``COLUMNS``): 0, 1, or NaN where a row lacks the label."""
    result = np.full((len(rows), COLUMNS), np.nan, np.float32)
    unknown = float("nan")
    severity = [unknown if r.example.severity is None else r.example.severity for r in rows]
    unsafe = [unknown if r.example.unsafe is None else float(r.example.unsafe) for r in rows]
    result[:, SEVERITY_COLUMNS] = cumulative_targets(
        torch.tensor(severity, dtype=torch.float32), torch.tensor(unsafe, dtype=torch.float32)
    ).numpy()
    for number, row in enumerate(rows):
        names = row.example.pku_categories
        if row.example.unsafe is False:
            names = ()
        if names is not None and row.example.unsafe is not None:
            result[number, CATEGORY_COLUMNS] = [name in names for name in CATEGORIES]
        for column, label in enumerate(row.signals):
            if label is not None:
                result[number, SIGNAL_COLUMNS.start + column] = label
    return result


def category_weights(targets: Targets, most: float = 6.0) -> Tensor:
    """Weight of positives per category: the root of how much rarer they are, up to ``most``."""
    categories = targets[:, CATEGORY_COLUMNS]
    positives = np.nansum(categories, axis=0)
    negatives = np.sum(~np.isnan(categories), axis=0) - positives
    return torch.from_numpy(
        np.clip(np.sqrt(negatives / np.maximum(positives, 1)), 1, most).astype(np.float32)
    )
