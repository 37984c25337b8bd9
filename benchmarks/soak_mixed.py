"""Half an hour of mixed load: what grows.

    .venv/bin/python -m benchmarks.soak_mixed [--minutes 30] [--warm-up 5] [--json]

Moderations and chats, whole and streamed, harmless and harmful, one text in four sent before, under
70% of the capacity that is measured first, with the real guard and every exchange recorded in a
Redis. Memory and open files are the service's own process; each moment is the median of samples of
a minute (of a tenth of the time where that is less). Redis's own memory, which keeps the records,
is shown beside.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import uvloop

from benchmarks import measure
from benchmarks.mixed_load import DEADLINE, Answered, Clients, Traffic
from benchmarks.mixed_world import World, opened
from benchmarks.streams_figures import table
from models.checkpoint import DEFAULT_GUARD

SHARE: Final = 0.7
"""Of the capacity."""
GROWTH_GOAL: Final = 0.05
"""Share by which memory may grow after the warm-up."""
FILES_GOAL: Final = 8
"""Open files more than after the warm-up: connections that happen to be open."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What the processes hold at a time."""

    seconds: float
    resident_bytes: int
    files: int
    redis_bytes: int


@dataclass(slots=True)
class Counts:
    """What came of the requests."""

    results: Counter[str] = field(default_factory=Counter)
    leaked: int = 0
    longest: float = 0.0
    """Seconds."""

    def add(self, answered: Sequence[Answered]) -> None:
        """Counts these too."""
        for one in answered:
            self.results[one.result] += 1
            self.leaked += one.is_leaked
            self.longest = max(self.longest, one.ended - one.begun)


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--guard", type=Path, default=DEFAULT_GUARD)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--warm-up", type=float, default=5.0, help="minutes of these")
    parser.add_argument("--rate", type=float, help="requests a second, in place of the measured")
    parser.add_argument("--lanes", type=int, default=32, help="clients that find the capacity")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.guard = options.guard.resolve()
    options.warm_up = min(options.warm_up, options.minutes / 3)
    measure.need_two_cores()
    with tempfile.TemporaryDirectory(prefix="sg-soak-") as directory, ExitStack() as stack:
        rate, counts, samples = uvloop.run(_soak(stack, Path(directory), options))
    _report(rate, counts, samples, options)


async def _soak(
    stack: ExitStack, directory: Path, options: argparse.Namespace
) -> tuple[float, Counts, list[Sample]]:
    world = await opened(stack, directory / "world", options.guard)
    samples: list[Sample] = []
    counts = Counts()
    clients = Clients(world.port, Traffic("soak"))
    await clients.busy(options.lanes, 2.0)
    rate = options.rate or SHARE * await clients.busy(options.lanes, 10.0)
    begun = time.perf_counter()
    end = begun + 60 * options.minutes
    load = asyncio.create_task(clients.steady(rate, lambda: time.perf_counter() < end))
    while not load.done():
        await asyncio.wait([load], timeout=min(5.0, options.minutes))
        if time.perf_counter() < end:
            samples.append(_sample(world, begun))
        counts.add(clients.answered)
        clients.answered.clear()
    await load
    clients.close()
    return rate, counts, samples


def _sample(world: World, begun: float) -> Sample:
    service, redis = world.service.process.pid, world.redis.process.pid
    return Sample(
        time.perf_counter() - begun,
        measure.tree(service)[0].resident_bytes,
        len(os.listdir(f"/proc/{service}/fd")),
        measure.tree(redis)[0].resident_bytes,
    )


def _around(samples: Sequence[Sample], seconds: float, width: float) -> Sample:
    """Medians of what was sampled in the ``width`` seconds before ``seconds``."""
    near = [one for one in samples if seconds - width <= one.seconds <= seconds] or samples[-1:]
    return Sample(
        seconds,
        round(measure.median([one.resident_bytes for one in near])),
        round(measure.median([one.files for one in near])),
        round(measure.median([one.redis_bytes for one in near])),
    )


def _report(
    rate: float, counts: Counts, samples: Sequence[Sample], options: argparse.Namespace
) -> None:
    width = min(60.0, 6 * options.minutes)
    warm, last = 60 * options.warm_up, samples[-1].seconds
    shown = sorted({width, *(warm + (last - warm) * part / 5 for part in range(6))})
    held = table(
        f"The service under {rate:.0f} requests a second of mixed load",
        *("minute", "resident, MiB", "open files", "Redis, MiB"),
    )
    for moment in shown:
        one = _around(samples, moment, width)
        held.add_row(
            *(f"{moment / 60:.1f}", f"{one.resident_bytes / 2**20:.1f}", str(one.files)),
            f"{one.redis_bytes / 2**20:.1f}",
        )
    before, after = _around(samples, warm, width), _around(samples, last, width)
    growth = after.resident_bytes / before.resident_bytes - 1
    files = after.files - before.files
    failed = sum(count for result, count in counts.results.items() if result != "200")
    late = measure.goal(counts.longest, DEADLINE, at_most=True)
    longest = ("longest, s", f"{counts.longest:.2f}", late)
    became = table("What became of it", "figure", "value", "goal")
    for name, value, goal in (
        ("requests", str(counts.results.total()), "–"),
        *((f"of these {name}", str(count), "–") for name, count in counts.results.items()),
        ("failed", str(failed), measure.goal(failed, 0, at_most=True)),
        ("leaked", str(counts.leaked), measure.goal(counts.leaked, 0, at_most=True)),
        longest,
        ("memory's growth", f"{growth:+.1%}", measure.goal(growth, GROWTH_GOAL, at_most=True)),
        ("open files more", f"{files:+d}", measure.goal(files, FILES_GOAL, at_most=True)),
    ):
        became.add_row(name, value, goal)
    figures: dict[str, Any] = {
        "requests_per_second": rate,
        "samples": [asdict(one) for one in samples],
        "results": dict(counts.results),
        "leaked": counts.leaked,
        "longest_seconds": counts.longest,
        "memory_growth": growth,
        "files_more": files,
    }
    if not options.json:
        print(f"`{' '.join(['python -m benchmarks.soak_mixed', *sys.argv[1:]])}`")
    measure.report("soak_mixed", [held, became], figures, options.json)


if __name__ == "__main__":
    main()
