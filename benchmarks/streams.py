"""What streams cost, how soon they begin, and how many one core carries.

    .venv/bin/python -m benchmarks.streams [--quick] [--only cpu first_text capacity] [--json]

Our service runs as it does in use, on a core of its own; an upstream that speaks at a pace, and the
clients, share another. All texts differ, so that no verdict was given before; every rule of the
policy annotates, so that none is cut short. ``benchmarks.streams_soak`` is beside this.

1. CPU time of a stream of 60 events, with a guard that answers at once, against nginx as a reverse
   proxy that does not buffer. Each event comes by itself; then, as a second row, all at once.
2. Time to the first text in ``hold`` with the real guard: from when the upstream had sent the first
   piece that is judged, less one judgement of it (the median of the guard alone, on that core).
3. How many streams of 20 tokens a second one core carries with the real guard: the most whose last
   byte is less than a second behind the upstream's, on average, while the guard's queue stays.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import uvloop
from rich.table import Table

from benchmarks import measure
from benchmarks.nginx import nginx
from benchmarks.proxy import Target
from benchmarks.streaming_load import (
    RATE,
    Client,
    Talker,
    first_piece,
    numbers,
    prompt,
    prose,
)
from benchmarks.streams_capacity import TOKENS, capacity
from benchmarks.streams_figures import cpu_seconds, table
from models.checkpoint import DEFAULT_GUARD
from models.guard import judge
from models.inputs import GuardInput, Turn
from models.text_guard import TextGuard

CPU_GOAL: Final = 4.0
"""Ours over nginx's, at most."""
FIRST_TEXT_GOAL: Final = 15.0
"""Milliseconds beyond the first piece and one judgement, at most."""
_EVENTS_BESIDE_TEXT: Final = 3
"""A role, a finish reason, ``[DONE]``."""
_EVENTS: Final = 60
_PARTS: Final = ("cpu", "first_text", "capacity")
_POLICY: Final = "version: 1\nid: benchmark\nrules:\n  - action: annotate\n"


def main() -> None:
    """Measures and reports; with ``--own``, judges first pieces alone and prints milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--guard", type=Path, default=DEFAULT_GUARD)
    parser.add_argument("--only", nargs="+", choices=_PARTS, default=list(_PARTS))
    parser.add_argument("--rounds", type=int, default=3, help="of the first figure")
    parser.add_argument("--seconds", type=float, default=8.0, help="of one such round")
    parser.add_argument("--concurrency", type=int, default=16, help="streams at once in it")
    parser.add_argument("--streams", type=int, default=60, help="of the second figure")
    parser.add_argument("--hold", type=float, default=20.0, help="seconds, of the third figure")
    parser.add_argument("--start", type=int, default=32, help="streams that it begins with")
    parser.add_argument("--quick", action="store_true", help="in a minute, to see that it runs")
    parser.add_argument("--own", type=int, metavar="COUNT", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.own:
        print(json.dumps(_own(options.guard, options.own)))
        return
    options.guard = options.guard.resolve()
    if options.quick:
        options.rounds, options.seconds, options.streams, options.hold = 1, 2.0, 6, 4.0
    measure.need_two_cores()
    with tempfile.TemporaryDirectory(prefix="sg-bench-") as directory:
        uvloop.run(_measure(Path(directory), options))


async def _measure(directory: Path, options: argparse.Namespace) -> None:
    tables: list[Table] = []
    figures: dict[str, Any] = {}
    # A service of its own for the first figure: its guard is another.
    if "cpu" in options.only:
        with ExitStack() as stack:
            tables.append(await _cpu(stack, directory, options, figures))
    if {"first_text", "capacity"} & set(options.only):
        with ExitStack() as stack:
            talker = await talking(stack, lambda number: prose(TOKENS, number))
            target = await service(stack, directory, talker.port, options.guard)
            # The first streams pay for what is loaded late.
            await asyncio.gather(
                *(Client(target.port).stream(next(numbers), leaves=True) for _ in range(4))
            )
            if "first_text" in options.only:
                tables.append(await _first_text(target, talker, options, figures))
            if "capacity" in options.only:
                tables.append(await capacity(target, talker, options, figures))
    if not options.json:
        print(f"`python -m benchmarks.streams {' '.join(sys.argv[1:])}`".replace(" `", "`"))
    measure.report("streams", tables, figures, options.json)


# --- What runs ---------------------------------------------------------------------------------
async def talking(stack: ExitStack, tokens: Any, interval: float = 1 / RATE) -> Talker:
    """An upstream in this process."""
    talker = Talker(tokens, interval)
    await talker.start()
    stack.callback(talker.close)
    return talker


async def service(stack: ExitStack, directory: Path, upstream: int, guard: Path | None) -> Target:
    """Our service on its core, with a guard, or with one that answers at once."""
    port, name = measure.free_port(), "instant" if guard is None else "guard"
    log, policy = directory / f"{name}.log", directory / "policy.yaml"
    policy.write_text(_POLICY)
    module = ["benchmarks.instant"] if guard is None else ["sluicegate", "serve"]
    command: list[str | Path | int] = [sys.executable, "-m", *module, "--port", port]
    command += [
        *("--upstream", f"http://127.0.0.1:{upstream}"),
        *("--data-directory", directory / f"{name}-data"),
    ]
    if guard is not None:
        command += ["--guard", guard]
    settings = {
        "SLUICEGATE_POLICY": str(policy),
        "SLUICEGATE_GUARD_THREADS": "1",
        # What is remembered has its size soon, so that memory that grows is a leak.
        "SLUICEGATE_CACHED_VERDICTS": "200",
    }
    process = stack.enter_context(
        measure.started(command, log, core=measure.SERVICE_CORE, environment=settings)
    )
    await measure.answers(process, port, "/health/ready", log)
    return Target("sluicegate", port, process.pid)


# --- 1. CPU of a stream ------------------------------------------------------------------------
async def _cpu(
    stack: ExitStack, directory: Path, options: argparse.Namespace, figures: dict[str, Any]
) -> Table:
    tokens = _EVENTS - _EVENTS_BESIDE_TEXT
    talker = await talking(stack, lambda number: prose(tokens, number))
    ours = await service(stack, directory, talker.port, None)
    behind_nginx = await nginx(stack, directory, talker.port, buffers=False)
    targets = [ours, *([Target("nginx", *behind_nginx)] if behind_nginx else [])]
    paces = {"one by one": 0.01, "at once": 0.0}
    rounds: dict[tuple[str, str], list[float]] = {}
    state: dict[str, list[float]] = {}
    for talker.interval in paces.values():
        for target in targets:
            await _streams_for(target, talker, options.concurrency, 1.0)
    for _ in range(options.rounds):
        for pace, talker.interval in paces.items():
            for target in targets:
                before = cpu_seconds(target.process_id)
                count = await _streams_for(target, talker, options.concurrency, options.seconds)
                proxy, valkey = (
                    (after - earlier) / count * 1e6
                    for after, earlier in zip(cpu_seconds(target.process_id), before, strict=True)
                )
                rounds.setdefault((target.name, pace), []).append(proxy)
                if target is ours:
                    state.setdefault(pace, []).append(valkey)
    shown = table(
        f"CPU of a stream of {_EVENTS} events through a proxy on one core",
        *("events come", "ours, µs", "Valkey's, µs", "nginx, µs", "ratio", "goal"),
    )
    for pace in paces:
        cpu = measure.median(rounds["sluicegate", pace])
        valkey = measure.median(state[pace])
        row = {"microseconds": cpu, "valkey_microseconds": valkey}
        cells = ["–", "–", "–"]
        if behind_nginx:
            theirs = measure.median(rounds["nginx", pace])
            row |= {"nginx_microseconds": theirs, "ratio": cpu / theirs}
            is_goal = pace == "one by one"
            met = measure.goal(cpu / theirs, CPU_GOAL, at_most=True) if is_goal else "–"
            cells = [f"{theirs:.0f}", f"{cpu / theirs:.1f}", met]
        figures.setdefault("cpu", {})[pace] = row
        shown.add_row(pace, f"{cpu:.0f}", f"{valkey:.0f}", *cells)
    return shown


async def _streams_for(target: Target, talker: Talker, concurrency: int, seconds: float) -> int:
    """How many streams came to their end over so many connections; each must be whole."""
    deadline = time.perf_counter() + seconds
    count = 0

    async def lane() -> None:
        nonlocal count
        client = Client(target.port)
        while time.perf_counter() < deadline:
            number = next(numbers)
            heard = await client.stream(number)
            spoken = talker.said.pop(number)
            if not heard.ended or tuple(heard.pieces()) != spoken.tokens:
                raise RuntimeError(f"{target.name} did not pass a stream on as it came")
            count += 1
        client.close()

    await asyncio.gather(*(lane() for _ in range(concurrency)))
    return count


# --- 2. Time to the first text -----------------------------------------------------------------
async def _first_text(
    target: Target, talker: Talker, options: argparse.Namespace, figures: dict[str, Any]
) -> Table:
    client = Client(target.port)
    waits = []
    for _ in range(options.streams):
        number = next(numbers)
        heard = await client.stream(number, leaves=True)
        spoken = talker.said.pop(number)
        assert heard.first_text_at is not None
        sent, _ = first_piece(spoken.tokens)
        waits.append((heard.first_text_at - spoken.times[sent]) * 1e3)
    own = await asyncio.to_thread(_own_in_a_process, options.guard, options.streams)
    over = sorted(wait - own for wait in waits)
    middle, late = measure.median(over), over[min(int(0.95 * len(over)), len(over) - 1)]
    figures["first_text"] = {
        "own_milliseconds": own,
        "wait_milliseconds": measure.median(waits),
        "added_p50_milliseconds": middle,
        "added_p95_milliseconds": late,
    }
    shown = table(
        "First text in hold, after the upstream's first piece",
        *("streams", "wait p50, ms", "one judgement, ms", "beyond it p50, ms", "p95, ms", "goal"),
    )
    shown.add_row(
        *(str(len(waits)), f"{measure.median(waits):.1f}", f"{own:.1f}", f"{middle:.1f}"),
        *(f"{late:.1f}", measure.goal(middle, FIRST_TEXT_GOAL, at_most=True)),
    )
    return shown


def _own_in_a_process(guard: Path, count: int) -> float:
    command = [
        *("taskset", "-c", str(measure.SERVICE_CORE), sys.executable, "-m", "benchmarks.streams"),
        *("--own", str(count), "--guard", str(guard.resolve())),
    ]
    done = subprocess.run(  # noqa: S603 - runs this very script, on the service's core
        command, cwd=measure.ROOT, capture_output=True, check=True
    )
    return float(json.loads(done.stdout))


def _own(guard: Path, count: int) -> float:
    """Median milliseconds of judging a first piece, of others than the service was asked about."""
    loaded = TextGuard(guard, threads=1)
    taken = []
    for number in range(10**6, 10**6 + max(count, 20)):
        _, text = first_piece(prose(TOKENS, number))
        item = GuardInput("response", text, (Turn("user", prompt(number)),))
        started = time.perf_counter()
        judge(loaded, [item])
        taken.append((time.perf_counter() - started) * 1e3)
    return measure.median(taken)


if __name__ == "__main__":
    main()
