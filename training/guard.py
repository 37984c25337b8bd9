"""Stage ``guard``: fine-tunes an encoder into a text guard.

    sluicegate train guard --config training/configs/guard.yaml --output DIR [--set key=value]...
    accelerate launch sluicegate.py train guard ...        # several GPUs

Input: the labelled files that the recipe names. Output: a checkpoint directory (see
``models/checkpoint.py``) with ``metrics.jsonl``, one object a step. A run that was stopped goes on
from its last saved step when the same command is given again.

The targets are those of PKU-SafeRLHF's severity-sensitive moderation (safety, severity, 19
categories; arXiv 2406.15513). Deviations: a small encoder with linear heads in place of a 7B
decoder; severity as three cumulative probabilities rather than classes; four signals beside it;
each loss masked by the labels that a row has; calibration on held-out rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import PartialState

from training.fitting import fit
from training.guard_recipe import GuardConfig
from training.release import release

__all__ = ["GuardConfig", "run"]


def run(config: GuardConfig, output: Path) -> dict[str, Any]:
    """Fits, calibrates, exports and describes a guard in ``output``; returns its metrics.

    Of several processes under ``accelerate launch`` one does what follows the fit.
    """
    mix = fit(config, output)
    return release(config, mix, output) if PartialState().is_main_process else {}
