"""Stage ``teacher-scores``: what a larger guard says of every row of a recipe.

    sluicegate train teacher-scores --config training/configs/guard.yaml --output DIR \\
        --set data=DATA --set teacher=TEACHER

Input: the student's recipe and the checkpoint directory of a teacher, made by ``train guard`` with
a larger base. Output: ``DIR/teacher.safetensors``, raw logits in float16 under each row's key (a
digest of its role and words), so that nobody computes them twice; the student's recipe names it as
``teacher_scores``. A run that was stopped goes on where it stopped; rows that only a teacher labels
come first, so that a file of part of them is of use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.progress import Progress
from tokenizers import Tokenizer

from models import checkpoint, network
from models.inputs import InputEncoder
from training import teacher_scores
from training.batches import network_logits
from training.guard_recipe import GuardConfig, training_rows
from training.labelled import LabelError

SCORES: Final = "teacher.safetensors"
_CHUNK: Final = 2000
"""Rows between two savings."""


def run(config: GuardConfig, output: Path) -> dict[str, Any]:
    """Scores the recipe's rows; returns how many there are and how many are scored."""
    if config.teacher is None:
        raise LabelError("teacher-scores: the recipe names no teacher (--set teacher=DIRECTORY)")
    rows = training_rows(config).questions()
    path = output / SCORES
    output.mkdir(parents=True, exist_ok=True)
    known = dict(teacher_scores.read(path)) if path.exists() else {}
    guard = network.load(config.teacher)
    encoder = InputEncoder(Tokenizer.from_file(str(config.teacher / checkpoint.TOKENIZER)))
    todo = [row for row in rows if row.key not in known]
    with Progress() as progress:
        task = progress.add_task("teacher scores", total=len(rows), completed=len(rows) - len(todo))
        for start in range(0, len(todo), _CHUNK):
            chunk = todo[start : start + _CHUNK]
            windows = [encoder.encode(row.example.guard_input()).windows[0] for row in chunk]
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
                logits = network_logits(guard, windows).astype(np.float16)
            known |= {row.key: scored for row, scored in zip(chunk, logits, strict=True)}
            teacher_scores.write(path, known)
            progress.advance(task, len(chunk))
    return {"rows": len(rows), "scored": len(known)}
