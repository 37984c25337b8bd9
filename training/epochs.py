"""The batches of a run, epoch by epoch, each row in other views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.inputs import InputEncoder, Window
from training import teacher_scores
from training.batches import Batch, epoch_batches
from training.guard_recipe import GuardConfig, TrainingRows
from training.mix import Row
from training.targets import Targets, label_matrix
from training.views import view


@dataclass(frozen=True, slots=True)
class LabelledBatch:
    """A batch with what its rows' labels and the teacher ask: shapes (n, ``COLUMNS``), (n,)."""

    batch: Batch
    targets: Tensor
    teacher: Tensor
    weight: Tensor


class Epochs:
    """The batches of all epochs, in their order; each epoch shows the rows in other views."""

    def __init__(self, config: GuardConfig, training: TrainingRows, encoder: InputEncoder) -> None:
        self._config = config
        self._around = training.around
        self._encoder = encoder
        known = {} if config.teacher_scores is None else teacher_scores.read(config.teacher_scores)
        self.rows = [row for row in training.rows if row.key in known or not row.needs_teacher]
        self._teacher = teacher_scores.probabilities([row.key for row in self.rows], known)
        passes = range(config.first_epoch, config.first_epoch + config.epochs)
        self._plans = {
            epoch: epoch_batches(
                self._windows(self._views(epoch)), config.tokens_per_batch, config.seed + epoch
            )
            for epoch in passes
        }

    @property
    def steps(self) -> int:
        """Over all epochs."""
        return sum(map(len, self._plans.values()))

    def batches(
        self, done: int, process: int = 0, processes: int = 1
    ) -> Iterator[tuple[int, LabelledBatch]]:
        """Steps from ``done`` on with the rows that are this process's share of them."""
        step = 0
        for epoch, plan in self._plans.items():
            if step + len(plan) <= done:
                step += len(plan)
                continue
            rows = self._views(epoch)
            windows, targets = self._windows(rows), label_matrix(rows)
            for numbers in plan:
                if step >= done:
                    share = numbers[process::processes] or numbers[:1]
                    yield step, self._batch(share, rows, windows, targets)
                step += 1

    def _views(self, epoch: int) -> list[Row]:
        generator = np.random.default_rng((self._config.seed, epoch))
        return [view(row, self._config.views, self._around, generator) for row in self.rows]

    def _windows(self, rows: Sequence[Row]) -> list[Window]:
        # Labels speak of the whole text; its first window is taken for it.
        return [self._encoder.encode(row.example.guard_input()).windows[0] for row in rows]

    def _batch(
        self, numbers: list[int], rows: list[Row], windows: list[Window], targets: Targets
    ) -> LabelledBatch:
        return LabelledBatch(
            Batch([windows[number] for number in numbers]),
            torch.from_numpy(targets[numbers]),
            torch.from_numpy(self._teacher[numbers]),
            torch.tensor([rows[number].weight for number in numbers]),
        )
