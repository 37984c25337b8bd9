"""How many streams one core carries with the real guard: a part of ``benchmarks.streams``."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from dataclasses import dataclass, field
from typing import Any, Final

from rich.table import Table

from benchmarks.proxy import Target
from benchmarks.streaming_load import RATE, Client, Heard, Spoken, Talker, numbers, prose
from benchmarks.streams_figures import cpu_seconds, metrics, table

LAG_GOAL: Final = 1.0
"""Mean seconds of the last byte behind the upstream's, at which streams fall behind."""
TOKENS: Final = 200
"""Of a stream: ten seconds. Less where one looks on for less than twice as long."""
_MOST: Final = 1024


@dataclass(slots=True)
class _Step:
    """So many streams at once, and how they did."""

    streams: int
    lags: list[float] = field(default_factory=list)
    """Seconds of the last byte behind the upstream's."""
    late: list[float] = field(default_factory=list)
    """Seconds by which the upstream was behind itself."""
    waiting: list[float] = field(default_factory=list)
    """Windows that waited for the guard, now and then."""
    tokens: int = 0
    judgements: float = 0.0
    windows: float = 0.0
    cpu: float = 0.0
    """Share of the core."""

    @property
    def lag(self) -> float:
        """The mean; endless where no stream came to its end."""
        return statistics.fmean(self.lags) if self.lags else float("inf")

    @property
    def grew(self) -> bool:
        """Whether the queue did, between the first third of the time and the last."""
        third = max(len(self.waiting) // 3, 1)
        first, last = (
            statistics.fmean(part) for part in (self.waiting[:third], self.waiting[-third:])
        )
        return last > 2 * first + self.streams / 4

    @property
    def holds(self) -> bool:
        """Whether the service keeps up."""
        return self.lag < LAG_GOAL and not self.grew

    @property
    def is_valid(self) -> bool:
        """Whether the load kept up itself."""
        return statistics.fmean(self.late or [0.0]) < 0.3


async def capacity(
    target: Target, talker: Talker, options: argparse.Namespace, figures: dict[str, Any]
) -> Table:
    """Doubles the streams until they fall behind, then halves the gap to within a tenth."""
    steps: list[_Step] = []
    good, bad = 0, 0
    streams = options.start
    while streams <= _MOST and not (bad and bad - good <= max(bad // 10, 1)):
        step = await _step(target, talker, streams, options.hold)
        steps.append(step)
        if not step.is_valid:
            break
        if step.holds:
            good = streams
        else:
            bad = streams
        streams = (good + bad) // 2 if bad else streams * 2
    shown = table(
        f"Streams of {RATE:.0f} tokens a second on one core, with the guard",
        *("streams", "lag mean, s", "lag p95, s", "waiting windows", "core", "tokens/s"),
        *("judgements per 1,000 tokens", "windows", "holds"),
    )
    rows = []
    for step in sorted(steps, key=lambda one: one.streams):
        late = sorted(step.lags)[int(0.95 * len(step.lags))] if step.lags else float("inf")
        each = 1000 / max(step.tokens, 1)
        rows.append(
            {
                "streams": step.streams,
                "lag_seconds": step.lag,
                "lag_p95_seconds": late,
                "waiting_windows": statistics.fmean(step.waiting),
                "core": step.cpu,
                "tokens_per_second": step.tokens / options.hold,
                "judgements_per_1000_tokens": step.judgements * each,
                "windows_per_1000_tokens": step.windows * each,
                "holds": step.holds,
                "load_kept_up": step.is_valid,
            }
        )
        row = rows[-1]
        shown.add_row(
            *(str(step.streams), f"{step.lag:.2f}", f"{late:.2f}"),
            *(f"{row['waiting_windows']:.1f}", f"{step.cpu:.0%}"),
            *(f"{row['tokens_per_second']:.0f}", f"{row['judgements_per_1000_tokens']:.1f}"),
            f"{row['windows_per_1000_tokens']:.1f}",
            ("yes" if step.holds else "no") if step.is_valid else "the load fell behind",
        )
    figures["capacity"] = {"most": good, "steps": rows}
    return shown


async def _step(target: Target, talker: Talker, streams: int, seconds: float) -> _Step:
    """Begins one after the other over a stream's length, then looks on for ``seconds``."""
    length = min(TOKENS, int(seconds * RATE / 2))
    talker.tokens = lambda number: prose(length, number)
    ramp = length / RATE
    step, running = _Step(streams), set[int]()
    counts_from = time.perf_counter() + ramp
    clients = [Client(target.port) for _ in range(streams)]
    lanes = [
        asyncio.create_task(
            _lane(client, talker, running, step, counts_from, ramp * place / streams)
        )
        for place, client in enumerate(clients)
    ]
    await asyncio.sleep(ramp)
    before, cpu, sent = await metrics(target.port), cpu_seconds(target.process_id)[0], talker.sent
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        step.waiting.append((await metrics(target.port))["sluicegate_guard_waiting_windows"])
        await asyncio.sleep(seconds / 20)
    after = await metrics(target.port)
    step.tokens, step.cpu = talker.sent - sent, (cpu_seconds(target.process_id)[0] - cpu) / seconds
    key = 'sluicegate_guard_seconds_count{direction="response"}'
    step.judgements = after.get(key, 0.0) - before.get(key, 0.0)
    key = "sluicegate_guard_batch_rows_sum"
    step.windows = after[key] - before[key]
    now = time.perf_counter()
    for number in running:
        spoken = talker.said.get(number)
        if spoken is not None and spoken.is_over:
            step.lags.append(now - spoken.ended_at)
    for lane in lanes:
        lane.cancel()
    for client in clients:
        client.close()
    done = await asyncio.gather(*lanes, return_exceptions=True)
    for one in done:
        if isinstance(one, Exception):
            raise one
    talker.said.clear()
    await asyncio.sleep(1)
    return step


async def _lane(
    client: Client,
    talker: Talker,
    running: set[int],
    step: _Step,
    counts_from: float,
    delay: float,
) -> None:
    """One stream after the other, for ever."""
    await asyncio.sleep(delay)
    while True:
        number = next(numbers)
        running.add(number)
        heard = await client.stream(number)
        running.discard(number)
        spoken = talker.said.pop(number)
        if not heard.ended:
            raise RuntimeError("a stream ended early")
        if heard.last_at > counts_from:
            _note(step, heard, spoken)


def _note(step: _Step, heard: Heard, spoken: Spoken) -> None:
    step.lags.append(heard.last_at - spoken.ended_at)
    step.late.append(spoken.late)
