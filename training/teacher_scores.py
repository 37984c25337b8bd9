"""A teacher's scores as a file: raw logits in float16 under each row's key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from models.guard import COLUMNS
from training.labelled import LabelError

Scores = Mapping[bytes, NDArray[np.float16]]


def probabilities(keys: Sequence[bytes], known: Scores) -> NDArray[np.float32]:
    """The teacher's probabilities, shape (n, ``COLUMNS``); NaN for rows that it did not score."""
    nothing = np.full(COLUMNS, np.nan, np.float32)
    logits = np.array([known.get(key, nothing) for key in keys], np.float32).reshape(-1, COLUMNS)
    return np.asarray(1 / (1 + np.exp(-logits)), np.float32)


def read(path: Path) -> Scores:
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


def write(path: Path, known: Scores) -> None:
    """Written beside and renamed, so that a crash loses nothing."""
    keys = np.frombuffer(b"".join(known), np.uint8).reshape(-1, 16)
    logits = np.array(list(known.values()), np.float16).reshape(-1, COLUMNS)
    temporary = path.with_suffix(".part")
    save_file({"keys": keys, "logits": logits}, temporary)
    temporary.replace(path)
