"""Serves as ``sluicegate serve`` does, with a guard that answers at once and finds nothing.

What is left is what the proxy itself costs. ``python -m benchmarks.instant --port N --upstream URL
--data-directory DIR``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import uvloop

from models.guard import COLUMNS, Guard, Logits
from models.inputs import GuardInput, Window, Windows
from models.taxonomy import CATEGORIES, SIGNALS
from models.verdict import Coverage, Verdict
from service.server import serve
from service.settings import Settings


class InstantGuard(Guard):
    """See ``Guard``. The same verdict on everything, in no time."""

    id = "instant-1"

    def prepare(self, item: GuardInput) -> Windows:
        """One window of two tokens."""
        return Windows((Window((0, 0), 0),), Coverage(len(item.text), len(item.text), 1))

    def score(self, windows: Sequence[Window]) -> Logits:
        """Zeros."""
        return np.zeros((len(windows), COLUMNS), np.float32)

    def conclude(self, item: GuardInput, prepared: Windows, logits: Logits) -> Verdict:
        """Nothing found, with scores such as a guard gives, so that records are as long."""
        return Verdict(
            item.role,
            (0.0213, 0.0062, 0.0011),
            (0.0123,) * len(CATEGORIES),
            (0.0123,) * len(SIGNALS),
            prepared.coverage,
        )


def main() -> None:
    """Serves until it is told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--data-directory", type=Path, required=True)
    options = parser.parse_args()
    settings = Settings(
        port=options.port, upstream=options.upstream, data_directory=options.data_directory
    )
    uvloop.run(serve(settings, InstantGuard()))


if __name__ == "__main__":
    main()
