"""What a durable record costs an exchange, with a guard that answers at once.

    .venv/bin/python -m benchmarks.recording [--json]

Four services on one core, before the same fake upstream, in interleaved rounds: one that records
nothing (its policy samples one passed exchange in a billion); one with the private Valkey as
shipped, which syncs every write to the disk; one with a server that syncs each second
(``appendfsync everysec``); and one with a server that keeps no file. A chat that passes leaves two
records, of its prompt and of its answer. CPU time is the service's, with the server's beside it;
both share the core.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import uvloop

from benchmarks import measure
from benchmarks.measure import Load, median
from benchmarks.streams_figures import cpu_seconds, table
from service.private_valkey import server_binary

_CONCURRENCIES: Final = (1, 16)
_PROMPTS: Final = 20_000
"""More than verdicts are remembered."""
_NONE: Final = "no records"
_SERVERS: Final[Mapping[str, tuple[str, ...]]] = {
    "everysec": ("--appendonly", "yes", "--appendfsync", "everysec"),
    "in memory": ("--appendonly", "no"),
}


@dataclass(frozen=True, slots=True)
class Target:
    """A service, and its server where that is not its child."""

    port: int
    process_id: int
    server_id: int | None = None

    def cpu(self) -> tuple[float, float]:
        """Seconds so far: of the service, and of its Valkey."""
        own, private = cpu_seconds(self.process_id)
        if self.server_id is not None:
            private += sum(cpu_seconds(self.server_id))
        return own, private


@dataclass(frozen=True, slots=True)
class Round:
    """One target under load; CPU time in microseconds a request."""

    load: Load
    own_cpu: float
    server_cpu: float


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one round")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    measure.need_two_cores()
    with tempfile.TemporaryDirectory(prefix="sg-bench-") as directory, ExitStack() as stack:
        rounds = uvloop.run(_measure(stack, Path(directory), options.rounds, options.seconds))
    _report(rounds, options.json)


async def _measure(
    stack: ExitStack, directory: Path, rounds: int, seconds: float
) -> dict[tuple[str, int], list[Round]]:
    upstream, log = measure.free_port(), directory / "upstream.log"
    process = stack.enter_context(
        measure.started(
            [sys.executable, "-m", "tests.fake_upstream", "--port", upstream],
            log,
            core=measure.LOAD_CORE,
        )
    )
    await measure.answers(process, upstream, "/v1/models", log)
    policy = directory / "policy.yaml"
    policy.write_text(
        "version: 1\nid: none\nrules:\n  - action: allow\nrecord: {sample_passed: 1.0e-9}\n"
    )
    unrecorded = {"SLUICEGATE_POLICY": str(policy)}
    targets = {
        _NONE: await _service(stack, directory / "none", upstream, unrecorded),
        "private": await _service(stack, directory / "private", upstream, {}),
    }
    for name, settings in _SERVERS.items():
        home = directory / name.replace(" ", "-")
        home.mkdir()
        socket = home / "valkey.sock"
        server = stack.enter_context(
            measure.started(
                [
                    *(server_binary(), "--port", "0", "--unixsocket", socket, "--dir", home),
                    *("--save", "", *settings),
                ],
                home / "valkey.log",
                core=measure.SERVICE_CORE,
            )
        )
        while not socket.exists():  # noqa: ASYNC110 - a file has no event
            await asyncio.sleep(0.01)
        url = {"SLUICEGATE_STATE_URL": f"unix://{socket}"}
        targets[name] = await _service(stack, home, upstream, url, server.pid)
    requests = [_request(number) for number in range(_PROMPTS)]
    for target in targets.values():
        await measure.load(target.port, requests, 16, min(seconds, 1.5))
    results: dict[tuple[str, int], list[Round]] = {}
    for _ in range(rounds):
        for concurrency in _CONCURRENCIES:
            for name, target in targets.items():
                before = target.cpu()
                load = await measure.load(target.port, requests, concurrency, seconds)
                own, server_cpu = (
                    (after - earlier) / load.requests * 1e6
                    for after, earlier in zip(target.cpu(), before, strict=True)
                )
                results.setdefault((name, concurrency), []).append(Round(load, own, server_cpu))
    return results


async def _service(
    stack: ExitStack,
    directory: Path,
    upstream: int,
    settings: Mapping[str, str],
    server_id: int | None = None,
) -> Target:
    directory.mkdir(exist_ok=True)  # noqa: ASYNC240 - nothing else runs yet
    port, log = measure.free_port(), directory / "service.log"
    process = stack.enter_context(
        measure.started(
            [
                *(sys.executable, "-m", "benchmarks.instant", "--port", port),
                *("--upstream", f"http://127.0.0.1:{upstream}"),
                *("--data-directory", directory / "data"),
            ],
            log,
            core=measure.SERVICE_CORE,
            environment=settings,
        )
    )
    await measure.answers(process, port, "/health/ready", log)
    return Target(port, process.pid, server_id)


def _request(number: int) -> bytes:
    content = f"Which {number} plants grow on a balcony without sun?"
    body = {"model": "m", "messages": [{"role": "user", "content": content}]}
    return measure.request("/v1/chat/completions", body)


def _report(rounds: Mapping[tuple[str, int], Sequence[Round]], as_json: bool) -> None:
    rows = []
    shown = table(
        "A chat that leaves two records, on one core",
        *("records in", "concurrency", "CPU µs", "records' share, µs", "Valkey's CPU µs"),
        *("p50 ms", "records' share, ms", "p99 ms", "requests/s"),
    )
    for (name, concurrency), measured in rounds.items():
        row = _figures(measured)
        without = _figures(rounds[_NONE, concurrency])
        row["added_cpu_microseconds"] = row["cpu_microseconds"] - without["cpu_microseconds"]
        row["added_p50_milliseconds"] = row["p50_milliseconds"] - without["p50_milliseconds"]
        rows.append({"records": name, "concurrency": concurrency, **row})
        shown.add_row(
            *(name, str(concurrency), f"{row['cpu_microseconds']:.0f}"),
            *(f"{row['added_cpu_microseconds']:+.0f}", f"{row['server_cpu_microseconds']:.0f}"),
            *(f"{row['p50_milliseconds']:.2f}", f"{row['added_p50_milliseconds']:+.2f}"),
            *(f"{row['p99_milliseconds']:.2f}", f"{row['requests_per_second']:.0f}"),
        )
    if not as_json:
        print(f"`{' '.join(['python -m benchmarks.recording', *sys.argv[1:]])}`")
    measure.report("recording", [shown], {"rows": rows}, as_json)


def _figures(measured: Sequence[Round]) -> dict[str, float]:
    """Medians over rounds."""
    return {
        "cpu_microseconds": median([one.own_cpu for one in measured]),
        "server_cpu_microseconds": median([one.server_cpu for one in measured]),
        "requests_per_second": median([one.load.rate for one in measured]),
        "p50_milliseconds": median([one.load.quantile(0.5) * 1e3 for one in measured]),
        "p99_milliseconds": median([one.load.quantile(0.99) * 1e3 for one in measured]),
    }


if __name__ == "__main__":
    main()
