"""Many streams for minutes: what grows, what ends early, what comes out of order.

    .venv/bin/python -m benchmarks.streams_soak [--seconds 300] [--quick] [--json]

64 streams of 20 tokens a second at once, with the real guard in ``hold``, each finished and begun
again; one in sixteen is left by its client at its first text. Every token spells its number, so
that an event that is lost or overtaken shows. Memory and open files are the service's own process,
without its private Valkey, which keeps the records.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import uvloop

from benchmarks import measure
from benchmarks.streaming_load import Client, Talker, numbers
from benchmarks.streams import service, talking
from benchmarks.streams_figures import table
from models.checkpoint import DEFAULT_GUARD

GROWTH_GOAL: Final = 0.05
"""Share by which memory may grow after the warm-up."""
_FILES_GOAL: Final = 8
"""Open files more than after the warm-up: connections that happen to be open."""
_LEAVES: Final = 16
_DIGITS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(slots=True)
class Counts:
    """What became of the streams."""

    completed: int = 0
    left: int = 0
    ended_early: int = 0
    reordered: int = 0
    """Events that came before one that was sent before them, or twice."""
    lost: int = 0
    strange: int = 0
    """Events that nobody sent."""
    events: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """What the service holds at a time."""

    seconds: float
    resident_bytes: int
    files: int


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--guard", type=Path, default=DEFAULT_GUARD)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--warm-up", type=float, default=45.0, help="seconds of these")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="25 seconds, to see that it runs")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.guard = options.guard.resolve()
    if options.quick:
        options.seconds, options.warm_up = 25.0, 12.0
    measure.need_two_cores()
    with tempfile.TemporaryDirectory(prefix="sg-bench-") as directory, ExitStack() as stack:
        counts, samples = uvloop.run(_soak(stack, Path(directory), options))
    _report(counts, samples, options)


def spelled(number: int, length: int) -> tuple[str, ...]:
    """A text of so many tokens, each of which spells its place; sentences of a dozen."""
    dice = random.Random(number)  # noqa: S311 - a length, not a secret
    return tuple(
        f" {'-'.join(_DIGITS[int(digit)] for digit in str(place))}{'' if (place + 1) % 12 else '.'}"
        for place in range(dice.randint(length // 4, length))
    )


def check(counts: Counts, expected: Sequence[str], heard: Sequence[str]) -> None:
    """Counts what is wrong with a stream's tokens as they came."""
    places = {token: place for place, token in enumerate(expected)}
    counts.events += len(heard)
    highest = -1
    for token in heard:
        place = places.get(token)
        if place is None:
            counts.strange += 1
            continue
        if place <= highest:
            counts.reordered += 1
        highest = max(highest, place)
    counts.lost += len(places.keys() - set(heard))


async def _soak(
    stack: ExitStack, directory: Path, options: argparse.Namespace
) -> tuple[Counts, list[Sample]]:
    talker = await talking(stack, lambda number: spelled(number, 240))
    target = await service(stack, directory, talker.port, options.guard)
    begun = time.perf_counter()
    samples = [_sample(target.process_id, begun)]
    counts = Counts()
    end = begun + options.seconds
    lanes = [
        asyncio.create_task(_lane(target.port, talker, counts, end)) for _ in range(options.streams)
    ]
    warm = begun + min(options.warm_up, options.seconds / 2)
    every = max(options.seconds / 60, 1.0)
    while (now := time.perf_counter()) < end:
        await asyncio.sleep(max(min(every, end - now, warm - now if now < warm else every), 0.01))
        # The last, like all others, with every stream open.
        samples.append(_sample(target.process_id, begun))
    await asyncio.gather(*lanes)
    return counts, samples


def _sample(process_id: int, begun: float) -> Sample:
    member = measure.tree(process_id)[0]
    files = len(os.listdir(f"/proc/{process_id}/fd"))
    return Sample(time.perf_counter() - begun, member.resident_bytes, files)


async def _lane(port: int, talker: Talker, counts: Counts, end: float) -> None:
    """One stream after the other until the time is over."""
    client = Client(port)
    while time.perf_counter() < end:
        number = next(numbers)
        leaves = number % _LEAVES == 0
        heard = await client.stream(number, leaves=leaves)
        # One whose prompt was never passed on is nowhere.
        spoken = talker.said.pop(number, None)
        if leaves:
            counts.left += 1
        elif heard.ended and spoken is not None:
            counts.completed += 1
            check(counts, spoken.tokens, heard.pieces())
        else:
            counts.ended_early += 1
    client.close()


def _report(counts: Counts, samples: Sequence[Sample], options: argparse.Namespace) -> None:
    warm = next(
        (one for one in samples if one.seconds >= min(options.warm_up, options.seconds / 2)),
        samples[-1],
    )
    moments = {"start": samples[0], "after the warm-up": warm, "end": samples[-1]}
    held = table(
        f"The service under {options.streams} streams at once",
        *("moment", "seconds", "resident, MiB", "open files"),
    )
    for name, one in moments.items():
        mebibytes = one.resident_bytes / 2**20
        held.add_row(name, f"{one.seconds:.0f}", f"{mebibytes:.1f}", str(one.files))
    growth = samples[-1].resident_bytes / warm.resident_bytes - 1
    files = samples[-1].files - warm.files
    wrong = {
        "streams ended early": counts.ended_early,
        "events reordered": counts.reordered,
        "events lost": counts.lost,
        "events that nobody sent": counts.strange,
    }
    rows: list[tuple[str, str, str]] = [
        ("streams completed", str(counts.completed), "–"),
        ("streams left by their client", str(counts.left), "–"),
        ("events", str(counts.events), "–"),
        *((n, str(value), measure.goal(value, 0, at_most=True)) for n, value in wrong.items()),
        ("memory's growth", f"{growth:+.1%}", measure.goal(growth, GROWTH_GOAL, at_most=True)),
        ("open files more", f"{files:+d}", measure.goal(files, _FILES_GOAL, at_most=True)),
    ]
    became = table("What became of them", "figure", "value", "goal")
    for row in rows:
        became.add_row(*row)
    figures: dict[str, Any] = {
        "samples": [
            {"seconds": one.seconds, "resident_bytes": one.resident_bytes, "files": one.files}
            for one in samples
        ],
        "completed": counts.completed,
        "left": counts.left,
        "events": counts.events,
        **{name.replace(" ", "_"): value for name, value in wrong.items()},
        "memory_growth": growth,
        "files_more": files,
    }
    if not options.json:
        print(f"`{' '.join(['python -m benchmarks.streams_soak', *sys.argv[1:]])}`")
    measure.report("streams_soak", [held, became], figures, options.json)


if __name__ == "__main__":
    main()
