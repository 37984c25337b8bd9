"""A guard's directory on disk: where training and serving meet.

``card.json`` names the other files with their SHA-256; nothing is read whose hash differs. Weights
are ONNX or safetensors, never pickles.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, ValidationError

from models import inputs, taxonomy
from models.calibration import Calibration
from models.inputs import GuardInput, Speaker, Turn
from models.taxonomy import ROLES, Role
from models.verdict import Verdict

CARD: Final = "card.json"
TOKENIZER: Final = "tokenizer.json"
ONNX: Final = "guard.int8.onnx"
NETWORK: Final = "model.safetensors"
GOLDEN: Final = "golden.json"

DEFAULT_GUARD: Final = Path(__file__).parent / "weights" / "sluicegate-text-22m-2"
"""The guard that ships with the project."""


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message says which, why, and what to do."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RoleCalibration(_Frozen):
    """The numbers of a ``Calibration``."""

    scale: tuple[float, ...]
    bias: tuple[float, ...]
    window_slope: float = 0.0


class DataSource(_Frozen):
    """One source that the weights saw: its name, its licence as published, and how many rows."""

    name: str
    licence: str
    rows: int


class Card(_Frozen):
    """What a checkpoint says of itself."""

    id: str
    licence: str
    base: str
    base_licence: str
    taxonomy: str
    input_version: int
    network: dict[str, Any]
    """The encoder's configuration, as transformers reads it."""
    calibration: dict[Role, RoleCalibration]
    languages: tuple[str, ...]
    data: tuple[DataSource, ...]
    labels: str
    """Who labelled the data, in a sentence."""
    limits: tuple[str, ...]
    training: dict[str, Any]
    metrics: dict[str, Any]
    hashes: dict[str, str]


class GoldenCase(_Frozen):
    """A text with the scores that the checkpoint gave when it was made."""

    role: Role
    text: str
    context: tuple[tuple[Speaker, str], ...] = ()
    at_least: tuple[float, float, float]
    category_scores: tuple[float, ...]
    signal_scores: tuple[float, ...]

    @classmethod
    def of(cls, item: GuardInput, verdict: Verdict) -> GoldenCase:
        """The case that ``verdict`` on ``item`` makes."""
        return cls(
            role=item.role,
            text=item.text,
            context=tuple((turn.speaker, turn.text) for turn in item.context),
            at_least=verdict.at_least,
            category_scores=verdict.category_scores,
            signal_scores=verdict.signal_scores,
        )

    def guard_input(self) -> GuardInput:
        """The case as a guard reads it."""
        return GuardInput(self.role, self.text, tuple(Turn(*turn) for turn in self.context))


class Golden(_Frozen):
    """Cases that a loaded guard must reproduce, each probability within ``tolerance``."""

    tolerance: float
    cases: tuple[GoldenCase, ...]


class Checkpoint:
    """A directory whose card was read and found to fit this build.

    Raises ``CheckpointError`` if a file is missing, the card does not parse, or the taxonomy or
    input version is not ours. Hashes are checked when a file is asked for.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            self.card = Card.model_validate_json((directory / CARD).read_bytes())
        except OSError as error:
            raise CheckpointError(
                f"no checkpoint at {directory}: {CARD} cannot be read ({error.strerror});"
                " name a directory made by 'sluicegate train guard'"
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"{directory / CARD}: {where}: {first['msg']}") from error
        self._refuse("taxonomy", self.card.taxonomy, taxonomy.VERSION)
        self._refuse("input_version", self.card.input_version, inputs.VERSION)
        if missing := [role for role in ROLES if role not in self.card.calibration]:
            raise CheckpointError(f"{directory / CARD}: calibration lacks the role {missing[0]}")

    def _refuse(self, key: str, found: object, ours: object) -> None:
        if found != ours:
            raise CheckpointError(
                f"{self.directory / CARD}: {key} is {found!r}, this build has {ours!r};"
                " train the guard again or use the build that made it"
            )

    def file(self, name: str) -> Path:
        """The path of ``name``, whose bytes were found to have the hash that the card gives."""
        path = self.directory / name
        try:
            found = sha256(path)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read ({error.strerror}): restore it from where the checkpoint"
                " came from, or name another checkpoint"
            ) from error
        if found != self.card.hashes.get(name):
            raise CheckpointError(
                f"{path} does not have the hash in {CARD}: the file was changed or cut short;"
                " restore it from where the checkpoint came from"
            )
        return path

    def calibration(self, role: Role) -> Calibration:
        """The calibration of ``role``."""
        numbers = self.card.calibration[role]
        try:
            return Calibration(numbers.scale, numbers.bias, numbers.window_slope)
        except ValueError as error:
            raise CheckpointError(f"{self.directory / CARD}: {role}: {error}") from error

    def golden(self) -> Golden:
        """The texts whose scores a loaded guard must reproduce."""
        path = self.file(GOLDEN)
        try:
            return Golden.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise CheckpointError(f"{path}: {error.errors()[0]['msg']}") from error


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_card(directory: Path, card: Card) -> None:
    """Writes ``card`` with the hashes of the files that stand in ``directory`` now."""
    hashes = {
        name: sha256(directory / name)
        for name in (TOKENIZER, ONNX, NETWORK, GOLDEN)
        if (directory / name).exists()
    }
    text = json.dumps(
        card.model_copy(update={"hashes": hashes}).model_dump(mode="json"),
        indent=2,
        ensure_ascii=False,
    )
    (directory / CARD).write_text(text + "\n", encoding="utf-8")
