"""The text guard as it is served: int8 ONNX on ONNX Runtime, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

from models import checkpoint
from models.checkpoint import Checkpoint, CheckpointError
from models.guard import (
    CATEGORY_COLUMNS,
    COLUMNS,
    SEVERITY_COLUMNS,
    SIGNAL_COLUMNS,
    Logits,
    judge,
)
from models.inputs import GuardInput, InputEncoder, Window, Windows
from models.taxonomy import ROLES
from models.verdict import Verdict


class TextGuard:
    """A guard over a checkpoint directory.

    ``threads`` is how many cores one batch may use. Raises ``CheckpointError`` where a file is
    missing, has another hash, is not the format it should be, or has another shape.
    """

    def __init__(self, directory: Path, *, threads: int = 1) -> None:
        self.checkpoint = Checkpoint(directory)
        self._calibrations = {role: self.checkpoint.calibration(role) for role in ROLES}
        try:
            tokenizer = Tokenizer.from_file(str(self.checkpoint.file(checkpoint.TOKENIZER)))
        # The library raises bare Exception on a file that it cannot parse.
        except Exception as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{directory / checkpoint.TOKENIZER}: {error}") from error
        self._encoder = InputEncoder(tokenizer)
        self._session = _session(self.checkpoint.file(checkpoint.ONNX), threads)
        self._inputs = [node.name for node in self._session.get_inputs()]

    @property
    def id(self) -> str:
        """The checkpoint's name and version."""
        return self.checkpoint.card.id

    def prepare(self, item: GuardInput) -> Windows:
        """See ``Guard.prepare``."""
        return self._encoder.encode(item)

    def score(self, windows: Sequence[Window]) -> Logits:
        """See ``Guard.score``."""
        arrays = model_inputs(windows)
        # An encoder without segments has no input for them.
        (logits,) = self._session.run(["logits"], {name: arrays[name] for name in self._inputs})
        return np.asarray(logits, np.float32)

    def conclude(self, item: GuardInput, prepared: Windows, logits: Logits) -> Verdict:
        """See ``Guard.conclude``.

        Each column of a long text is that of its worst window, weighed by how many there were.
        """
        if not np.all(np.isfinite(logits)):
            raise ValueError("the guard's output is not finite")
        pooled = logits.max(axis=0, keepdims=True)
        (row,) = self._calibrations[item.role].probabilities(pooled, len(logits)).tolist()
        minor, moderate, severe = row[SEVERITY_COLUMNS]
        return Verdict(
            role=item.role,
            at_least=(minor, moderate, severe),
            category_scores=tuple(row[CATEGORY_COLUMNS]),
            signal_scores=tuple(row[SIGNAL_COLUMNS]),
            coverage=prepared.coverage,
        )

    def check(self) -> None:
        """Reproduces the golden texts; ``CheckpointError`` if a score is off."""
        golden = self.checkpoint.golden()
        for number, case in enumerate(golden.cases):
            # One at a time: a batch of them would be the largest that a small service ever holds.
            (verdict,) = judge(self, [case.guard_input()])
            expected = (*case.at_least, *case.category_scores, *case.signal_scores)
            found = (*verdict.at_least, *verdict.category_scores, *verdict.signal_scores)
            difference = float(np.max(np.abs(np.subtract(found, expected))))
            if difference > golden.tolerance:
                raise CheckpointError(
                    f"{self.checkpoint.directory}: golden text {number} differs by"
                    f" {difference:.3f} (allowed {golden.tolerance}): this machine or runtime"
                    " computes other scores than the one that made the checkpoint"
                )


def model_inputs(windows: Sequence[Window]) -> dict[str, NDArray[np.int64]]:
    """The inputs of the ONNX model by name, each of shape (n, longest window)."""
    shape = (len(windows), max(map(len, windows)))
    token_ids = np.zeros(shape, np.int64)
    attention_mask = np.zeros(shape, np.int64)
    token_type_ids = np.zeros(shape, np.int64)
    for row, window in enumerate(windows):
        length = len(window)
        token_ids[row, :length] = window.token_ids
        attention_mask[row, :length] = 1
        token_type_ids[row, window.context_length : length] = 1
    return {
        "input_ids": token_ids,
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
    }


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # A plan of memory is kept for each shape of batch, and here nearly every batch has another.
    options.enable_mem_pattern = False
    # Spinning threads would take the core from the event loop between batches.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    available = onnxruntime.get_available_providers()
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    try:
        session = onnxruntime.InferenceSession(
            str(path),
            options,
            providers=[name for name in wanted if name in available],
            # On a CPU the fused node is far slower than the two that it stands for.
            disabled_optimizers=["SkipLayerNormFusion"],
        )
    # The runtime's exceptions share no base class of its own.
    except Exception as error:
        raise CheckpointError(f"{path} is not a model that ONNX Runtime reads: {error}") from error
    (output,) = session.get_outputs()
    if output.name != "logits" or output.shape[-1] != COLUMNS:
        raise CheckpointError(f"{path}: expected one output 'logits' of {COLUMNS} columns")
    return session
