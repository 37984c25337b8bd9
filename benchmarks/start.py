"""Start to ready, and resident memory at rest and after the largest batches.

    .venv/bin/python -m benchmarks.start [--guard DIR] [--json]

Seconds from starting ``sluicegate serve`` until ``/health/ready`` answers 200 (median of five, the
private Valkey included); resident memory of the service's process once ready; and its peak after
batches that fill the token budget in every shape, and after a text of a million characters.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from benchmarks import measure
from models.checkpoint import DEFAULT_GUARD

READY_SECONDS: Final = 3.0
REST_MEBIBYTES: Final = 400
PEAK_MEBIBYTES: Final = 900
_SENTENCE: Final = "The quick brown fox jumps over the lazy dog near the river bank. "


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--guard", type=Path, default=DEFAULT_GUARD)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    asyncio.run(run(options))


async def run(options: argparse.Namespace) -> None:
    """Starts the service several times; loads the last one."""
    seconds: list[float] = []
    rest = peak = 0.0
    long_seconds = 0.0
    for number in range(options.starts):
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            port = measure.free_port()
            arguments: list[str | Path] = [
                *(sys.executable, "-m", "sluicegate", "serve", "--port", str(port)),
                *("--guard", options.guard.resolve(), "--data-directory", directory / "data"),
            ]
            begun = time.perf_counter()
            with measure.started(arguments, directory / "log") as process:
                await measure.answers(process, port, "/health/ready", directory / "log")
                seconds.append(time.perf_counter() - begun)
                if number == options.starts - 1:
                    rest = _memory(process.pid)[0]
                    for words in (1, 10, 20, 50, 100, 200, 400):
                        moderate(port, [_SENTENCE * max(words // 13, 1)] * 256)
                    begun = time.perf_counter()
                    (result,) = moderate(port, [_SENTENCE * (1_000_000 // len(_SENTENCE))])
                    long_seconds = time.perf_counter() - begun
                    judged = result["coverage"]["characters"]
                    assert judged["judged"] == judged["total"]
                    peak = _memory(process.pid)[1]
    middle = measure.median(seconds)
    table = Table("figure", "value", "goal")
    table.add_row(
        "seconds to ready", f"{middle:.2f}", measure.goal(middle, READY_SECONDS, at_most=True)
    )
    table.add_row(
        "MiB resident at rest", f"{rest:.0f}", measure.goal(rest, REST_MEBIBYTES, at_most=True)
    )
    table.add_row(
        "MiB resident at most", f"{peak:.0f}", measure.goal(peak, PEAK_MEBIBYTES, at_most=True)
    )
    table.add_row("seconds for a million characters", f"{long_seconds:.1f}", "judged whole")
    figures = {
        "seconds_to_ready": seconds,
        "resident_mebibytes": rest,
        "peak_mebibytes": peak,
        "million_characters_seconds": long_seconds,
    }
    measure.report("start", [table], figures, options.json)


def _memory(process_id: int) -> tuple[float, float]:
    """Resident and peak memory of the service's own process, in MiB."""
    own = measure.tree(process_id)[0]
    return own.resident_bytes / 2**20, own.peak_bytes / 2**20


def moderate(port: int, texts: list[str]) -> list[Any]:
    """The results of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request("POST", "/v1/moderations", json.dumps({"input": texts}))
        results: list[Any] = json.load(connection.getresponse())["results"]
    finally:
        connection.close()
    return results


if __name__ == "__main__":
    main()
