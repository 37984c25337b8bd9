"""Faults under a mixed load: what hangs, what leaks, what is lost, and how soon it is over.

    .venv/bin/python -m benchmarks.chaos [--only redis service …] [--quick] [--json]

The capacity of the service on one core is measured first, with the real guard. Then each fault in
turn, in a service of its own under 70% of that: some seconds of peace, the fault, and peace again.

- ``redis``, ``upstream``, ``service``: killed with SIGKILL, and started again after longer than an
  upstream is left alone for. ``service_private``: the same where state is the private Valkey.
- ``redis_hangs``, ``upstream_hangs``: stopped, and continued.
- ``disk``: a small disk with the data directory, private Valkey and spool included, is filled to
  its last byte; then what filled it is removed. It is a tmpfs, which only root may mount; else
  ``--small-disk`` names a directory on a small disk of its own.
- ``clock``: the wall clock of the service and of Redis jumps two hours ahead, then two behind the
  truth, then back. This takes a C compiler (``cc``).

For each: the longest request, which must end within its deadline; harmful texts that reached a
client, texts that were passed without a verdict; seconds from the part's return to the start of the
last request that failed, or until Redis is up and the spool empty, whichever is later; and flagged
answers whose record is not in ``/v1/events``, or is there twice.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import uvloop

from benchmarks import measure
from benchmarks.mixed_load import DEADLINE, Answered, Clients, Traffic
from benchmarks.mixed_world import World, opened, until_well
from benchmarks.skewed_clock import SkewedClock
from benchmarks.streams_figures import table
from models.checkpoint import DEFAULT_GUARD

SHARE: Final = 0.7
"""Of the capacity."""
RECOVERY_GOAL: Final = 5.0
"""Seconds from the part's return."""
_DISK_BYTES: Final = 48 * 2**20
_SKEW: Final = 7200
_PATIENCE: Final = 20.0
"""Seconds for what was spooled to arrive, and for its records to be found."""
_UNSCANNED: Final = (
    "sluicegate_bypasses_total",
    "sluicegate_released_before_verdict_characters_total",
)
FAULTS: Final = (
    "redis", "redis_hangs", "upstream", "upstream_hangs", "service", "service_private", "disk",
    "clock",
)  # fmt: skip


class CannotBeMade(Exception):
    """This machine lacks what a fault takes."""


@dataclass(frozen=True, slots=True)
class Lasting:
    """Seconds of the parts of a fault's time."""

    before: float
    fault: float
    after: float


@dataclass(frozen=True, slots=True)
class Came:
    """What came of a fault."""

    fault: str
    requests: int
    errors: dict[str, int]
    """Requests that were not answered to their end, by how."""
    longest: float
    """Seconds of the longest request."""
    leaked: int
    recovery: float
    spooled: int
    """Records that were put onto the disk."""
    flagged: int
    """Answers whose flagged record must be there."""
    lost: int
    doubled: int

    @property
    def is_good(self) -> bool:
        """Whether all goals are met."""
        wrong = self.leaked + self.lost + self.doubled
        return not wrong and self.longest <= DEADLINE and self.recovery <= RECOVERY_GOAL


def main() -> None:
    """Measures and reports; ends with 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--guard", type=Path, default=DEFAULT_GUARD)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--rate", type=float, help="requests a second, in place of the measured")
    parser.add_argument("--lanes", type=int, default=32, help="clients that find the capacity")
    parser.add_argument("--before", type=float, default=5.0, help="seconds")
    parser.add_argument("--fault", type=float, default=12.0, help="seconds")
    parser.add_argument("--after", type=float, default=20.0, help="seconds")
    parser.add_argument("--small-disk", type=Path, help="an empty directory on a disk of its own")
    parser.add_argument("--quick", action="store_true", help="short, to see that it runs")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.guard = options.guard.resolve()
    if options.quick:
        options.before, options.fault, options.after = 2.0, 4.0, 12.0
    measure.need_two_cores()
    with tempfile.TemporaryDirectory(prefix="sg-chaos-") as directory:
        rate, came, skipped = uvloop.run(_all(Path(directory), options))
    _report(rate, came, skipped, options.json)
    raise SystemExit(int(not all(one.is_good for one in came)))


async def _all(
    directory: Path, options: argparse.Namespace
) -> tuple[float, list[Came], dict[str, str]]:
    rate = options.rate or SHARE * await _capacity(directory / "capacity", options)
    lasting = Lasting(options.before, options.fault, options.after)
    came, skipped = [], {}
    for fault in options.only:
        with ExitStack() as stack:
            try:
                came.append(await _under(stack, directory, fault, rate, lasting, options))
            except CannotBeMade as error:
                skipped[fault] = str(error)
        if not options.json:
            print(f"{fault}: {skipped.get(fault) or came[-1]}", file=sys.stderr)
    return rate, came, skipped


async def _capacity(directory: Path, options: argparse.Namespace) -> float:
    with ExitStack() as stack:
        world = await opened(stack, directory, options.guard)
        clients = Clients(world.port, Traffic("capacity"))
        await clients.busy(options.lanes, 2.0)
        return await clients.busy(options.lanes, 3.0 if options.quick else 10.0)


# --- One fault ---------------------------------------------------------------------------------
async def _under(
    stack: ExitStack,
    directory: Path,
    fault: str,
    rate: float,
    lasting: Lasting,
    options: argparse.Namespace,
) -> Came:
    home = directory / fault
    clock = data = None
    if fault == "clock":
        (directory / "skew").mkdir()
        try:
            clock = SkewedClock(directory / "skew")
        except (OSError, subprocess.CalledProcessError) as error:
            raise CannotBeMade(str(error)) from error
    if fault == "disk":
        data = options.small_disk or _mounted(stack, directory / "small-disk")
    world = await opened(
        stack,
        home,
        options.guard,
        data=data,
        is_private=fault in ("disk", "service_private"),
        environment=clock.environment if clock else None,
    )
    async with aiohttp.ClientSession() as session:
        clients = Clients(world.port, Traffic(fault))
        goes_on = True
        load = asyncio.create_task(clients.steady(rate, lambda: goes_on))
        await asyncio.sleep(lasting.before)
        before = await world.figures(session)
        await _happens(fault, world, lasting.fault, clock)
        returned = time.perf_counter()
        well = await until_well(world, session, _PATIENCE)
        await asyncio.sleep(max(returned + lasting.after - time.perf_counter(), 0))
        goes_on = False
        await load
        clients.close()
        await until_well(world, session, _PATIENCE)
        records = await _records(world, session, clients.answered)
        figures = await world.figures(session)
    failed = [one for one in clients.answered if not one.is_good]
    late = max((one.begun - returned for one in failed), default=0.0)
    flagged = {one.asked.id: one.asked.harmful for one in clients.answered if one.is_flagged}
    # What a service that was killed had counted is added to what the next one counts.
    counted = [figures, before] if fault.startswith("service") else [figures]
    unscanned = sum(
        value for one in counted for name, value in one.items() if name.startswith(_UNSCANNED)
    )
    return Came(
        fault=fault,
        requests=len(clients.answered),
        errors=dict(Counter(one.result for one in failed)),
        longest=max((one.ended - one.begun for one in clients.answered), default=0.0),
        leaked=sum(one.is_leaked for one in clients.answered) + round(unscanned),
        recovery=max(late, well, 0.0),
        spooled=round(figures.get('sluicegate_records_total{result="spooled"}', 0)),
        flagged=len(flagged),
        lost=sum((name, side) not in records for name, side in flagged.items()),
        doubled=sum(count - 1 for count in records.values()),
    )


async def _happens(fault: str, world: World, seconds: float, clock: SkewedClock | None) -> None:
    """The fault, from its beginning to its end; returns when the part is given back."""
    part, _, how = fault.partition("_")
    if part in ("redis", "upstream", "service"):
        one = {"redis": world.redis, "upstream": world.upstream, "service": world.service}[part]
        if how == "hangs":
            one.pause()
            await asyncio.sleep(seconds)
            one.resume()
        else:
            one.kill()
            await asyncio.sleep(seconds)
            one.start()
    elif clock is not None:
        for skew in (_SKEW, -_SKEW):
            clock.set(skew)
            await asyncio.sleep(seconds / 2)
        clock.set(0)
    else:
        ballast = world.data / "ballast"
        end = time.perf_counter() + seconds
        # Whatever is freed meanwhile is taken too.
        while time.perf_counter() < end:
            _fill(ballast)
            await asyncio.sleep(0.05)
        ballast.unlink()


def _fill(path: Path) -> None:
    """Writes until the disk has no room, in ever smaller parts."""
    with path.open("ab", buffering=0) as file:
        size = 2**20
        while size:
            try:
                if file.write(bytes(size)) < size:
                    size //= 2
            except OSError:
                size //= 2


def _mounted(stack: ExitStack, path: Path) -> Path:
    """A disk of ``_DISK_BYTES``. Raises ``CannotBeMade``."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES},mode=700", "sg-chaos", str(path)]
    try:
        subprocess.run(command, check=True)  # noqa: S603 - our own directory
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotBeMade("only root may mount a small disk: --small-disk names one") from error
    unmount = ["umount", "-l", str(path)]
    stack.callback(lambda: subprocess.run(unmount, check=True))  # noqa: S603 - our own directory
    return path


# --- What was recorded -------------------------------------------------------------------------
async def _records(
    world: World, session: aiohttp.ClientSession, answered: Sequence[Answered]
) -> Counter[tuple[str, str]]:
    """How often each (request id, direction) is found among the flagged; asked for again until none
    is missing or patience ends.
    """
    wanted = {(one.asked.id, one.asked.harmful) for one in answered if one.is_flagged}
    end = time.perf_counter() + _PATIENCE
    while True:
        found: Counter[tuple[str, str]] = Counter()
        try:
            async with session.get(f"{world.url}/v1/events.jsonl?severity=minor") as response:
                response.raise_for_status()
                for line in (await response.text()).splitlines():
                    record = json.loads(line)
                    found[record["request_id"], record["direction"]] += 1
        except aiohttp.ClientError as error:
            print(f"records cannot be read: {error}", file=sys.stderr)
        if wanted <= found.keys() or time.perf_counter() > end:
            return found
        await asyncio.sleep(0.5)


# --- What is shown -----------------------------------------------------------------------------
def _report(rate: float, came: Sequence[Came], skipped: dict[str, str], as_json: bool) -> None:
    shown = table(
        f"Faults under {rate:.0f} requests a second",
        *("fault", "sent", "failed", "longest s", "leaked", "back s", "spooled", "flagged"),
        *("lost", "twice", "goals"),
    )
    shown.columns[0].min_width = max(map(len, FAULTS))
    failed = table("Requests that failed", "fault", "how", "number")
    for one in came:
        for how, count in sorted(one.errors.items()):
            failed.add_row(one.fault, how, str(count))
        shown.add_row(
            *(one.fault, str(one.requests), str(sum(one.errors.values())), f"{one.longest:.1f}"),
            *(str(one.leaked), f"{one.recovery:.1f}", str(one.spooled), str(one.flagged)),
            *(str(one.lost), str(one.doubled), "met" if one.is_good else "MISSED"),
        )
    for fault, reason in skipped.items():
        shown.add_row(fault, *["–"] * 9, "not measured")
        failed.add_row(fault, f"not measured: {reason}", "–")
    figures: dict[str, Any] = {
        "requests_per_second": rate,
        "deadline_seconds": DEADLINE,
        "faults": [{**asdict(one), "is_good": one.is_good} for one in came],
        "skipped": skipped,
    }
    if not as_json:
        print(f"`{' '.join(['python -m benchmarks.chaos', *sys.argv[1:]])}`")
    measure.report("chaos", [shown, failed], figures, as_json)


if __name__ == "__main__":
    main()
