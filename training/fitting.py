"""Fits the guard's network: the recipe, the losses, and runs that resume exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer

from models import checkpoint, network
from models.guard import CATEGORY_COLUMNS, SEVERITY_COLUMNS, SIGNAL_COLUMNS
from models.inputs import InputEncoder, Window
from models.network import GuardNetwork
from training import teacher
from training.batches import Batch, epoch_batches
from training.losses import distilled
from training.mix import Mix, MixConfig, Row, build
from training.recipe import read_mapping
from training.targets import Targets, category_weights, label_matrix
from training.views import Surroundings, ViewShares, excerpts, view


class CalibrationSet(BaseModel):
    """A file whose calibration half says where the operating point lies."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    """Relative to the data directory."""
    weight: float = Field(default=1.0, gt=0)
    """Of the whole set, however many rows it has."""


class GuardConfig(BaseModel):
    """The recipe. Unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    """Name and version of the guard that is made."""
    base: str
    """Encoder or decoder to start from: a hub id or a directory."""
    base_name: str
    """What the card calls it, wherever it was read from."""
    base_licence: str
    licence: str
    """Of the weights that are made."""
    data: Path
    """Directory that the sources' files are relative to."""
    mixes: tuple[MixConfig, ...]
    """Each a mapping, or a file's name relative to the recipe."""
    calibration: tuple[CalibrationSet, ...] = ()
    """Beside the rows held out of the mix."""
    labels: str
    limits: tuple[str, ...]
    languages: tuple[str, ...] = ("en",)

    views: ViewShares = ViewShares()
    excerpts_a_row: int = Field(default=2, ge=0)
    """Beginnings of an answer that are rows of their own."""
    documents: int = Field(default=1500, ge=0)
    """Pieces of long harmless texts."""
    teacher: Path | None = None
    """Checkpoint directory of a guard that labels the rows, for the stage ``teacher-scores``."""
    teacher_scores: Path | None = None
    """What that stage wrote."""
    teacher_weight: float = Field(default=0.5, ge=0, le=1)

    epochs: int = Field(default=2, ge=1)
    tokens_per_batch: int = Field(default=4096, ge=256)
    learning_rate: float = Field(default=1e-4, gt=0)
    head_learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = 0.01
    warmup_share: float = 0.06
    dropout: float = 0.1
    frozen_layers: int = Field(default=0, ge=0)
    """Lowest layers, with the embeddings, that stay as they were: saves time on few cores."""
    category_weight: float = 4.0
    signal_weight: float = 1.0
    held_out_share: float = Field(default=0.06, gt=0, lt=0.5)
    seed: int = 17
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is faster only on processors with instructions for it."""
    save_every: int = Field(default=200, ge=1)
    threads: int | None = None

    @field_validator("mixes", mode="before")
    @classmethod
    def _read_mixes(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, list | tuple):
            return value
        directory = (info.context or {}).get("directory", Path())
        return tuple(
            read_mapping(directory / item) if isinstance(item, str) else item for item in value
        )


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """What a recipe trains on: whole examples, excerpts, and what may stand around them."""

    mix: Mix
    rows: tuple[Row, ...]
    around: Surroundings


def training_rows(config: GuardConfig) -> TrainingRows:
    """The rows of a recipe, the same each time."""
    mix = build(config.data, config.mixes, config.held_out_share, config.seed)
    generator = np.random.default_rng(config.seed)
    extra = excerpts(mix.fit, config.excerpts_a_row, config.documents, generator)
    return TrainingRows(mix, (*mix.fit, *extra), Surroundings.of(mix.fit))


def fit(config: GuardConfig, output: Path) -> Mix:
    """Fits the network and leaves ``model.safetensors`` and ``tokenizer.json`` in ``output``.

    Under ``accelerate launch`` each process takes its share of every batch.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    accelerator = Accelerator(mixed_precision="bf16" if config.precision == "bfloat16" else "no")
    training = training_rows(config)
    output.mkdir(parents=True, exist_ok=True)
    (output / "mix.json").write_text(json.dumps(training.mix.report(), indent=1) + "\n", "utf-8")
    tokenizer = base_tokenizer(config.base)
    tokenizer.save(str(output / checkpoint.TOKENIZER))
    epochs = Epochs(config, training, InputEncoder(tokenizer))

    torch.manual_seed(config.seed)
    guard = network.from_base(config.base, config.dropout)
    network.freeze(guard, config.frozen_layers)
    is_head = {id(parameter) for parameter in guard.head.parameters()}
    trained = [parameter for parameter in guard.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for p in trained if id(p) not in is_head],
                "peak": config.learning_rate,
            },
            {"params": list(guard.head.parameters()), "peak": config.head_learning_rate},
        ],
        weight_decay=config.weight_decay,
    )
    done = _resume(output, guard, optimizer)
    model, optimizer = accelerator.prepare(guard, optimizer)
    model.train()
    positive_weight = category_weights(label_matrix(epochs.rows)).to(accelerator.device)
    with Progress(disable=not accelerator.is_main_process) as progress:
        task = progress.add_task("train guard", total=epochs.steps, completed=done)
        for step, batch in epochs.batches(
            done, accelerator.process_index, accelerator.num_processes
        ):
            # Seeded by step, so that a resumed run drops the same units.
            torch.manual_seed(config.seed * 1_000_003 + step)
            losses = step_losses(model, batch, positive_weight, config)
            loss = torch.stack(list(losses.values())).sum()
            if not torch.isfinite(loss):
                raise FloatingPointError(f"step {step}: the loss is not finite")
            optimizer.zero_grad(set_to_none=True)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trained, 1.0)
            # Set from the step alone, so that a resumed run has the same.
            factor = learning_rate_factor(step, epochs.steps, config.warmup_share)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
            if accelerator.is_main_process:
                record: dict[str, Any] = {"step": step, "loss": round(loss.item(), 5)}
                record |= {name: round(value.item(), 5) for name, value in losses.items()}
                with (output / "metrics.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(record) + "\n")
                progress.advance(task)
                if (step + 1) % config.save_every == 0:
                    _save_state(output, guard, optimizer, step + 1)
    if accelerator.is_main_process:
        network.save(guard, output / checkpoint.NETWORK)
    return training.mix


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
        known = {} if config.teacher_scores is None else teacher.read_scores(config.teacher_scores)
        self.rows = [row for row in training.rows if row.key in known or not row.needs_teacher]
        self._teacher = teacher.probabilities([row.key for row in self.rows], known)
        self._plans = [
            epoch_batches(
                self._windows(self._views(epoch)), config.tokens_per_batch, config.seed + epoch
            )
            for epoch in range(config.epochs)
        ]

    @property
    def steps(self) -> int:
        """Over all epochs."""
        return sum(map(len, self._plans))

    def batches(
        self, done: int, process: int = 0, processes: int = 1
    ) -> Iterator[tuple[int, LabelledBatch]]:
        """Steps from ``done`` on with the rows that are this process's share of them."""
        step = 0
        for epoch, plan in enumerate(self._plans):
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


def step_losses(
    guard: GuardNetwork, batch: LabelledBatch, positive_weight: Tensor, config: GuardConfig
) -> dict[str, Tensor]:
    """The weighted losses of one batch: severity, categories, signals."""
    device = positive_weight.device
    logits = guard(*batch.batch.inputs(device)).float()
    targets, soft = batch.targets.to(device), batch.teacher.to(device)
    weight = batch.weight.to(device)

    def part(columns: slice, of_positives: Tensor | None = None) -> Tensor:
        return distilled(
            logits[:, columns],
            targets[:, columns],
            soft[:, columns],
            config.teacher_weight if config.teacher_scores else 0.0,
            of_positives,
            weight,
        )

    return {
        "severity": part(SEVERITY_COLUMNS),
        "categories": config.category_weight * part(CATEGORY_COLUMNS, positive_weight),
        "signals": config.signal_weight * part(SIGNAL_COLUMNS),
    }


def learning_rate_factor(step: int, total: int, warmup_share: float) -> float:
    """Linear warm-up over ``warmup_share`` of the steps, then a cosine to zero."""
    warmup = max(1, round(total * warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def base_tokenizer(base: str) -> Tokenizer:
    """The fast tokenizer of a hub id or directory, without truncation or padding."""
    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(base).backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


_STATE = "state.safetensors"


def _save_state(output: Path, guard: GuardNetwork, optimizer: Any, step: int) -> None:
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
