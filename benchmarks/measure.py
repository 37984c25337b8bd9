"""What the benchmarks share: processes on cores of their own, their CPU time, load, and tables."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, cast

from rich.console import Console
from rich.table import Table

ROOT: Final = Path(__file__).parent.parent
LOAD_CORE: Final = 0
"""Where the load comes from, and the fake upstream."""
SERVICE_CORE: Final = 1
"""What is measured has this core for itself."""

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PACKAGES: Final = ("fastapi", "uvicorn", "httptools", "redis", "onnxruntime", "torch")


# --- The machine -------------------------------------------------------------------------------
def machine() -> dict[str, Any]:
    """What the figures were measured on, and how busy it was before."""
    cpu = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "load_average": os.getloadavg()[0],
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def report(name: str, tables: Sequence[Table], figures: Mapping[str, Any], as_json: bool) -> None:
    """Prints the tables and the machine, or all of it as one JSON object."""
    here = machine()
    if as_json:
        print(json.dumps({"benchmark": name, "machine": here, **figures}, indent=2))
        return
    console = Console(width=110)
    for table in tables:
        console.print(table)
    packages = ", ".join(f"{key} {value}" for key, value in here["packages"].items())
    console.print(
        f"{here['cpu']}, {here['cores']} cores, {here['memory_gib']} GiB, {here['system']},"
        f" Python {here['python']}, {packages}; load average {here['load_average']:.1f}",
        highlight=False,
    )


def goal(value: float, bound: float, *, at_most: bool = False) -> str:
    """How a figure stands to its goal."""
    met = value <= bound if at_most else value >= bound
    return f"{'≤' if at_most else '≥'} {bound:g}: {'met' if met else 'MISSED'}"


def median(values: Sequence[float]) -> float:
    """The middle one, the lower of two."""
    return sorted(values)[(len(values) - 1) // 2]


# --- Processes ---------------------------------------------------------------------------------
def need_two_cores() -> None:
    """Keeps this process to the core of the load; ends it where there is no second core."""
    if not {LOAD_CORE, SERVICE_CORE} <= os.sched_getaffinity(0):
        sys.exit(f"this benchmark needs cores {LOAD_CORE} and {SERVICE_CORE}")
    os.sched_setaffinity(0, {LOAD_CORE})


@contextmanager
def started(
    arguments: Sequence[str | Path | int],
    log: Path,
    *,
    core: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A program of ours, on ``core`` alone where one is given, ended with the block.

    What it says goes to ``log``. It does not inherit settings of a service.
    """
    pinned = ["taskset", "-c", str(core)] if core is not None else []
    inherited = {key: value for key, value in os.environ.items() if "SLUICEGATE" not in key}
    with log.open("ab") as output:
        process = subprocess.Popen(  # noqa: S603 - runs what a benchmark names, never input
            [*pinned, *map(str, arguments)],
            cwd=ROOT,
            env={**inherited, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def answers(
    process: subprocess.Popen[bytes], port: int, path: str, log: Path, seconds: float = 120
) -> None:
    """Returns once GET ``path`` gives a 200; ends the benchmark if that takes too long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.005)
            continue
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            if b" 200 " in await reader.readline():
                return
        except OSError:
            pass
        finally:
            writer.close()
        await asyncio.sleep(0.02)
    sys.exit(f"{process.args!r} does not answer on port {port}; it said:\n{_end_of(log)}")


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


@dataclass(frozen=True, slots=True)
class Member:
    """A process of a tree: its program, its CPU time so far, and its resident memory."""

    name: str
    cpu_seconds: float
    """User and system, with children that have ended."""
    resident_bytes: int
    peak_bytes: int


def tree(process_id: int) -> list[Member]:
    """A process and all its descendants that live."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int(_stat(int(entry.name))[1])
            except OSError:
                continue
    found = [process_id]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    return [_member(number) for number in found]


def _stat(process_id: int) -> list[str]:
    """The fields of /proc/PID/stat from the third (the state) on."""
    return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()


def _member(process_id: int) -> Member:
    fields = _stat(process_id)
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{process_id}/status").read_text().splitlines()
    )
    return Member(
        status["Name"].strip(),
        sum(map(int, fields[11:15])) / _TICKS,
        int(status.get("VmRSS", "0 kB").split()[0]) * 1024,
        int(status.get("VmHWM", "0 kB").split()[0]) * 1024,
    )


# --- Load --------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Load:
    """What a round of requests came to."""

    requests: int
    seconds: float
    latencies: tuple[float, ...]
    """Of each request, in seconds, in ascending order."""

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds

    def quantile(self, share: float) -> float:
        """The latency in seconds that ``share`` of the requests stay below."""
        return self.latencies[min(int(share * self.requests), self.requests - 1)]


def request(path: str, body: Any, headers: Mapping[str, str] | None = None) -> bytes:
    """A POST of JSON, as bytes for ``load``."""
    content = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "host: 127.0.0.1",
        "content-type: application/json",
        f"content-length: {len(content)}",
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


async def load(port: int, requests: Sequence[bytes], concurrency: int, seconds: float) -> Load:
    """Sends ``requests`` round and round for ``seconds`` over ``concurrency`` kept connections.

    Each connection has one request on its way at a time, and waits for its last answer. Anything
    but a 200 ends the benchmark: what refuses is quick.
    """
    loop = asyncio.get_running_loop()
    started_at = time.perf_counter()
    state = _Round(requests, started_at + seconds)
    connections = []
    for _ in range(concurrency):
        _, protocol = await loop.create_connection(lambda: _Connection(state), "127.0.0.1", port)
        connections.append(protocol)
    await asyncio.gather(*(connection.done for connection in connections))
    elapsed = time.perf_counter() - started_at
    return Load(len(state.latencies), elapsed, tuple(sorted(state.latencies)))


class _Round:
    """What the connections of one round share."""

    def __init__(self, requests: Sequence[bytes], deadline: float) -> None:
        self.requests = requests
        self.deadline = deadline
        self.sent = 0
        self.latencies: list[float] = []

    def next(self) -> bytes:
        self.sent += 1
        return self.requests[self.sent % len(self.requests)]


class _Connection(asyncio.Protocol):
    """One client. Knows as much of HTTP as the servers here speak: answers with a length."""

    def __init__(self, state: _Round) -> None:
        self._round = state
        self._buffer = b""
        self._sent_at = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n") + 4
        if end < 4:
            return
        head = self._buffer[:end].lower()
        if b" 200 " not in head[:16]:
            self._fail(f"a request was answered with {self._buffer[:1000]!r}")
            return
        _, found, rest = head.partition(b"\r\ncontent-length:")
        if not found:
            self._fail("an answer has no content-length")
            return
        if len(self._buffer) < end + int(rest.partition(b"\r\n")[0]):
            return
        self._buffer = b""
        now = time.perf_counter()
        self._round.latencies.append(now - self._sent_at)
        if now < self._round.deadline:
            self._send()
        else:
            self._end()

    def connection_lost(self, error: Exception | None) -> None:
        self._fail("a connection was closed before its answer")

    def _send(self) -> None:
        self._sent_at = time.perf_counter()
        self._transport.write(self._round.next())

    def _end(self) -> None:
        if not self.done.done():
            self.done.set_result(None)
        self._transport.close()

    def _fail(self, reason: str) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError(reason))
        self._transport.close()
