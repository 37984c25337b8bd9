"""Stage ``teacher-scores``: what a larger guard says of every row of a recipe.

    sluicegate train teacher-scores --config training/configs/guard.yaml --output DIR \\
        --set data=DATA --set teacher=TEACHER

Input: the student's recipe and the checkpoint directory of a teacher, made by ``train guard`` with
a larger base. Output: ``DIR/teacher.safetensors``, raw logits in float16 under each row's key (a
digest of its role and words), so that nobody computes them twice; the student's recipe names it as
``teacher_scores``. A run that was stopped goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from models import checkpoint, network
from models.guard import COLUMNS, pack
from models.inputs import InputEncoder
from training.batches import network_logits
from training.labelled import LabelError

if TYPE_CHECKING:
    from training.fitting import GuardConfig

SCORES: Final = "teacher.safetensors"
_SAVE_EVERY: Final = 100

Scores = Mapping[bytes, NDArray[np.float16]]


def run(config: GuardConfig, output: Path) -> dict[str, Any]:
    """Scores the recipe's rows; returns how many, and how far teacher and labels agree."""
    from training.fitting import training_rows

    if config.teacher is None:
        raise LabelError("teacher-scores: the recipe names no teacher (--set teacher=DIRECTORY)")
    rows = training_rows(config).rows
    path = output / SCORES
    output.mkdir(parents=True, exist_ok=True)
    known = dict(read_scores(path)) if path.exists() else {}
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
                _write(path, known)
    _write(path, known)
    return {"rows": len(rows), "scored": len(known)}


def probabilities(keys: Sequence[bytes], known: Scores) -> NDArray[np.float32]:
    """The teacher's probabilities, shape (n, ``COLUMNS``); NaN for rows that it did not score."""
    nothing = np.full(COLUMNS, np.nan, np.float32)
    logits = np.array([known.get(key, nothing) for key in keys], np.float32).reshape(-1, COLUMNS)
    return np.asarray(1 / (1 + np.exp(-logits)), np.float32)


def read_scores(path: Path) -> Scores:
    """The scores in a file; ``LabelError`` where it is not one."""
    try:
        arrays = load_file(path)
        keys, logits = arrays["keys"], arrays["logits"]
    except (OSError, SafetensorError, KeyError) as error:
        raise LabelError(f"{path} is not a file of teacher scores: {error}") from error
    if keys.shape != (len(logits), 16) or logits.shape[1:] != (COLUMNS,):
        raise LabelError(
            f"{path}: shapes {keys.shape} and {logits.shape} are not of teacher scores"
        )
    return {key.tobytes(): row for key, row in zip(keys, logits, strict=True)}


def _write(path: Path, known: Scores) -> None:
    keys = np.frombuffer(b"".join(known), np.uint8).reshape(-1, 16)
    logits = np.array(list(known.values()), np.float16).reshape(-1, COLUMNS)
    temporary = path.with_suffix(".part")
    save_file({"keys": keys, "logits": logits}, temporary)
    temporary.replace(path)
