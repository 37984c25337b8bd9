"""Fits the guard's network: the recipe, the batches, the losses, and runs that resume exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer

from models import checkpoint, network
from models.guard import (
    CATEGORY_COLUMNS,
    COLUMNS,
    SEVERITY_COLUMNS,
    SIGNAL_COLUMNS,
    Logits,
    pack,
)
from models.inputs import InputEncoder, Window
from models.network import GuardNetwork
from models.taxonomy import CATEGORIES
from training.losses import cumulative_targets, masked_binary_cross_entropy
from training.mix import Mix, Row, Source, build

LENGTH_STEP: Final = 32


class GuardConfig(BaseModel):
    """The recipe. Unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    """Name and version of the guard that is made."""
    base: str
    """Encoder to start from: a hub id or a directory."""
    base_name: str
    """What the card calls it, wherever it was read from."""
    base_licence: str
    licence: str
    """Of the weights that are made."""
    data: Path
    """Directory that the sources' files are relative to."""
    sources: tuple[Source, ...]
    licences: dict[str, str]
    """Licence of each original source, for the card."""
    labels: str
    limits: tuple[str, ...]
    languages: tuple[str, ...] = ("en",)

    epochs: int = Field(default=2, ge=1)
    tokens_per_batch: int = Field(default=4096, ge=256)
    learning_rate: float = Field(default=1e-4, gt=0)
    head_learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = 0.01
    warmup_share: float = 0.06
    dropout: float = 0.1
    category_weight: float = 4.0
    signal_weight: float = 1.0
    held_out_share: float = Field(default=0.06, gt=0, lt=0.5)
    seed: int = 17
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is faster only on processors with instructions for it."""
    save_every: int = Field(default=200, ge=1)
    threads: int | None = None


class Batch:
    """Encoded rows with their targets, padded to a common length."""

    def __init__(self, windows: Sequence[Window], targets: NDArray[np.float32]) -> None:
        shape = (len(windows), max(map(padded_length, windows)))
        self.input_ids = torch.zeros(shape, dtype=torch.int64)
        self.attention_mask = torch.zeros(shape, dtype=torch.int64)
        self.token_type_ids = torch.zeros(shape, dtype=torch.int64)
        for row, window in enumerate(windows):
            length = len(window)
            self.input_ids[row, :length] = torch.tensor(window.token_ids)
            self.attention_mask[row, :length] = 1
            self.token_type_ids[row, window.context_length : length] = 1
        self.targets = torch.from_numpy(targets)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """In the order of ``GuardNetwork.forward``."""
        return self.input_ids, self.attention_mask, self.token_type_ids


def fit(config: GuardConfig, output: Path) -> Mix:
    """Fits the network and leaves ``model.safetensors`` and ``tokenizer.json`` in ``output``."""
    if config.threads:
        torch.set_num_threads(config.threads)
    mix = build(config.data, config.sources, config.held_out_share, config.seed)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = base_tokenizer(config.base)
    tokenizer.save(str(output / checkpoint.TOKENIZER))
    encoder = InputEncoder(tokenizer)
    # Labels speak of the whole text; its first window is taken for it.
    windows = [encoder.encode(row.example.guard_input()).windows[0] for row in mix.fit]
    targets = label_matrix(mix.fit)

    torch.manual_seed(config.seed)
    guard = network.from_base(config.base, config.dropout)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(guard.encoder.parameters()), "peak": config.learning_rate},
            {"params": list(guard.head.parameters()), "peak": config.head_learning_rate},
        ],
        weight_decay=config.weight_decay,
    )
    plan = [
        rows
        for epoch in range(config.epochs)
        for rows in epoch_batches(windows, config.tokens_per_batch, config.seed + epoch)
    ]
    positive_weight = category_weights(targets)
    done = _resume(output, guard, optimizer)
    guard.train()
    with Progress() as progress, (output / "metrics.jsonl").open("a", encoding="utf-8") as log:
        task = progress.add_task("train guard", total=len(plan), completed=done)
        for step in range(done, len(plan)):
            # Seeded by step, so that a resumed run drops the same units.
            torch.manual_seed(config.seed * 1_000_003 + step)
            rows = plan[step]
            batch = Batch([windows[row] for row in rows], targets[rows])
            losses = step_losses(guard, batch, positive_weight, config)
            loss = torch.stack(list(losses.values())).sum()
            if not torch.isfinite(loss):
                raise FloatingPointError(f"step {step}: the loss is not finite")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(guard.parameters(), 1.0)
            # Set from the step alone, so that a resumed run has the same.
            factor = learning_rate_factor(step, len(plan), config.warmup_share)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
            record: dict[str, Any] = {"step": step, "loss": round(loss.item(), 5)}
            record |= {name: round(value.item(), 5) for name, value in losses.items()}
            log.write(json.dumps(record) + "\n")
            log.flush()
            progress.advance(task)
            if (step + 1) % config.save_every == 0:
                _save_state(output, guard, optimizer, step + 1)
    network.save(guard, output / checkpoint.NETWORK)
    return mix


def step_losses(
    guard: GuardNetwork, batch: Batch, positive_weight: Tensor, config: GuardConfig
) -> dict[str, Tensor]:
    """The weighted losses of one batch: severity, categories, signals."""
    with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
        logits = guard(*batch.inputs())
    logits, targets = logits.float(), batch.targets
    return {
        "severity": masked_binary_cross_entropy(
            logits[:, SEVERITY_COLUMNS], targets[:, SEVERITY_COLUMNS]
        ),
        "categories": config.category_weight
        * masked_binary_cross_entropy(
            logits[:, CATEGORY_COLUMNS], targets[:, CATEGORY_COLUMNS], positive_weight
        ),
        "signals": config.signal_weight
        * masked_binary_cross_entropy(logits[:, SIGNAL_COLUMNS], targets[:, SIGNAL_COLUMNS]),
    }


def label_matrix(rows: Sequence[Row]) -> NDArray[np.float32]:
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


def category_weights(targets: NDArray[np.float32], most: float = 6.0) -> Tensor:
    """Weight of positives per category: the root of how much rarer they are, up to ``most``."""
    categories = targets[:, CATEGORY_COLUMNS]
    positives = np.nansum(categories, axis=0)
    negatives = np.sum(~np.isnan(categories), axis=0) - positives
    return torch.from_numpy(
        np.clip(np.sqrt(negatives / np.maximum(positives, 1)), 1, most).astype(np.float32)
    )


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


def learning_rate_factor(step: int, total: int, warmup_share: float) -> float:
    """Linear warm-up over ``warmup_share`` of the steps, then a cosine to zero."""
    warmup = max(1, round(total * warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


@torch.no_grad()
def network_logits(guard: GuardNetwork, windows: Sequence[Window]) -> Logits:
    """Logits of all windows in float32, shape (n, ``COLUMNS``)."""
    guard.eval()
    result = np.empty((len(windows), COLUMNS), np.float32)
    empty = np.empty((0, COLUMNS), np.float32)
    for rows in pack([len(window) for window in windows]):
        batch = Batch([windows[row] for row in rows], empty)
        result[rows] = guard(*batch.inputs()).numpy()
    return result


def base_tokenizer(base: str) -> Tokenizer:
    """The fast tokenizer of a hub id or directory, without truncation or padding."""
    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(base).backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


_STATE = "state.safetensors"


def _save_state(
    output: Path, guard: GuardNetwork, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Parameters and Adam's moments; written beside and renamed, so that a crash loses nothing."""
    tensors = {f"model.{name}": value.contiguous() for name, value in guard.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{number}.{key}": value.contiguous() for key, value in state.items()}
    tensors["step"] = torch.tensor(step)
    temporary = output / f"{_STATE}.part"
    save_file(tensors, temporary)
    temporary.replace(output / _STATE)


def _resume(output: Path, guard: GuardNetwork, optimizer: torch.optim.Optimizer) -> int:
    """Restores the saved state if there is one; the number of steps that are done."""
    path = output / _STATE
    if not path.exists():
        (output / "metrics.jsonl").unlink(missing_ok=True)
        return 0
    tensors = load_file(path)
    step = int(tensors.pop("step"))
    model = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    guard.load_state_dict(model)
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("adam."):
            _, number, name = key.split(".", 2)
            states.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (output / "metrics.jsonl").write_text("".join(lines[:step]), encoding="utf-8")
    return step
