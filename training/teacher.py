"""Stage ``teacher-scores``: what a larger guard says of every row of a recipe.

    sluicegate train teacher-scores --config training/configs/guard.yaml --output DIR \\
        --set data=DATA --set teacher=TEACHER

Input: the student's recipe and the checkpoint directory of a teacher, made by ``train guard`` with
a larger base. Output: ``DIR/teacher.safetensors``, raw logits in float16 under each row's key (a
digest of its role and words), so that nobody computes them twice; the student's recipe names it as
``teacher_scores``. A run that was stopped goes on where it stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.progress import Progress
from tokenizers import Tokenizer

from models import checkpoint, network
from models.guard import pack
from models.inputs import InputEncoder
from training import teacher_scores
from training.batches import network_logits
from training.guard_recipe import GuardConfig, training_rows
from training.labelled import LabelError

SCORES: Final = "teacher.safetensors"
_SAVE_EVERY: Final = 100


def run(config: GuardConfig, output: Path) -> dict[str, Any]:
    """Scores the recipe's rows; returns how many, and how far teacher and labels agree."""
    if config.teacher is None:
        raise LabelError("teacher-scores: the recipe names no teacher (--set teacher=DIRECTORY)")
    rows = training_rows(config).rows
    path = output / SCORES
    output.mkdir(parents=True, exist_ok=True)
    known = dict(teacher_scores.read(path)) if path.exists() else {}
    guard = network.load(config.teacher)
    encoder = InputEncoder(Tokenizer.from_file(str(config.teacher / checkpoint.TOKENIZER)))
    todo = [row for row in rows if row.key not in known]
    windows = [encoder.encode(row.example.guard_input()).windows[0] for row in todo]
    with Progress() as progress:
        task = progress.add_task("teacher scores", total=len(rows), completed=len(rows) - len(todo))
        for number, batch in enumerate(pack([len(window) for window in windows]), 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
                logits = network_logits(guard, [windows[row] for row in batch])
            known |= {todo[row].key: logits[i].astype(np.float16) for i, row in enumerate(batch)}
            progress.advance(task, len(batch))
            if number % _SAVE_EVERY == 0:
                teacher_scores.write(path, known)
    teacher_scores.write(path, known)
    return {"rows": len(rows), "scored": len(known)}
