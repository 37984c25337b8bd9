"""What ``sluicegate labels`` does, against the state that the settings name."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from service.audit import Audit
from service.command_state import opened
from service.errors import ConfigurationError
from service.events import Events
from service.kept_texts import KeptTexts
from service.labels import ExportCounts, Labels
from service.settings import Settings


@dataclass(frozen=True, slots=True)
class Exported:
    """What a file holds now; ``counts`` are those of this time."""

    examples: int
    counts: ExportCounts


async def export(settings: Settings, output: Path) -> Exported:
    """Adds labelled examples to ``output``, a JSON line each, which it makes where it is not there.

    What it holds stays, since texts of examples are kept here for a while only; what it holds
    already is not added again. The file changes as a whole or not at all. Raises
    ``ConfigurationError`` where it cannot be read or written.
    """
    known = _known(output)
    counts = ExportCounts()
    with _adding_to(output) as file:
        async with opened(settings) as state:
            texts = KeptTexts(state, Audit(state))
            labels = Labels(state, Events(state), texts)
            async for line in labels.export(None, counts, known=known):
                file.write(line)
    return Exported(len(known) + counts.examples, counts)


@contextmanager
def _adding_to(output: Path) -> Iterator[IO[bytes]]:
    """A copy of a file to write on at its end, which takes its place if all goes well."""
    # A link stays one.
    output = output.resolve()
    new: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
        new = Path(name)
        with open(handle, "wb") as file:
            if output.exists():
                with output.open("rb") as before:
                    shutil.copyfileobj(before, file)
                shutil.copymode(output, new)
            yield file
            file.flush()
            os.fsync(file.fileno())
        new.replace(output)
    except OSError as error:
        raise ConfigurationError(f"{output} cannot be written: {error.strerror}") from error
    finally:
        if new is not None:
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)


def _known(output: Path) -> Set[str]:
    """Ids of the examples in a file. ``ConfigurationError`` names a line that is none."""
    known: set[str] = set()
    try:
        with output.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    known.add(str(json.loads(line)["id"]))
                except (ValueError, KeyError, TypeError):
                    raise ConfigurationError(
                        f"{output}, line {number}: no labelled example: name another file"
                    ) from None
                if not line.endswith(b"\n"):
                    raise ConfigurationError(f"{output} ends within a line: name another file")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ConfigurationError(f"{output} cannot be read: {error.strerror}") from error
    return known
