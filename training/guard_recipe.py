"""The recipe of a text guard, and the rows that it trains on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from training.mix import Mix, MixConfig, Row, build
from training.recipe import read_mapping
from training.views import Surroundings, ViewShares, excerpts


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

    start: Path | None = None
    """What an earlier fit on the same base left: its network is where this one begins."""
    first_epoch: int = Field(default=0, ge=0)
    """How many passes that fit made: this one shows the rows in other views, in another order."""
    epochs: int = Field(default=2, ge=1)
    tokens_per_batch: int = Field(default=4096, ge=256)
    learning_rate: float = Field(default=1e-4, gt=0)
    head_learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = 0.01
    warmup_share: float = 0.06
    dropout: float = 0.1
    lora_rank: int | None = Field(default=None, ge=1)
    """Trains adapters of this rank on all linear layers in place of the weights themselves."""
    gradient_checkpointing: bool = False
    """Less memory for more time."""
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
    excerpts: tuple[Row, ...]
    around: Surroundings

    @property
    def rows(self) -> tuple[Row, ...]:
        """All of them."""
        return (*self.mix.fit, *self.excerpts)

    def questions(self) -> list[Row]:
        """The rows that a teacher is asked about, those first that only it labels.

        What is plainly harmless, or a piece of what is harmless, leaves nothing to ask.
        """
        whole = [row for row in self.mix.fit if not row.everyday]
        pieces = [row for row in self.excerpts if row.needs_teacher]
        return sorted([*whole, *pieces], key=lambda row: not row.needs_teacher)


def training_rows(config: GuardConfig) -> TrainingRows:
    """The rows of a recipe, the same each time."""
    mix = build(config.data, config.mixes, config.held_out_share, config.seed)
    generator = np.random.default_rng(config.seed)
    extra = excerpts(mix.fit, config.excerpts_a_row, config.documents, generator)
    return TrainingRows(mix, tuple(extra), Surroundings.of(mix.fit))
