"""What a mixed load runs against: the service with the real guard, its upstream, and its Redis.

Each is a process that can be killed, made to hang, and started again on the port that it had. The
service has one core; everything else shares the other with the load.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import aiohttp

from benchmarks import measure
from service.private_valkey import server_binary

_POLICY: Final = (
    "version: 1\nid: benchmark\nrules:\n  - {severity: minor, action: block}\n  - {action: allow}\n"
)
"""Blocks all harm, so that each exchange leaves one record of a direction."""
_SETTINGS: Final = {
    "SLUICEGATE_GUARD_THREADS": "1",
    "SLUICEGATE_GUARD_SECONDS": "5",
    "SLUICEGATE_UPSTREAM_CONNECT_SECONDS": "2",
    "SLUICEGATE_UPSTREAM_FIRST_BYTE_SECONDS": "5",
    "SLUICEGATE_UPSTREAM_IDLE_SECONDS": "5",
    "SLUICEGATE_UPSTREAM_TOTAL_SECONDS": "10",
    # What is remembered has its size within a minute.
    "SLUICEGATE_CACHED_VERDICTS": "2000",
}
"""Deadlines that a test can wait for; all else is as shipped."""


class Part:
    """A process. ``start`` may be called again once it was killed."""

    def __init__(
        self,
        stack: ExitStack,
        arguments: Sequence[str | Path | int],
        log: Path,
        core: int,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._stack = stack
        self._arguments = arguments
        self.log = log
        self._core = core
        self._environment = environment
        self.process: subprocess.Popen[bytes]
        self.start()

    def start(self) -> None:
        """Starts it."""
        self.process = self._stack.enter_context(
            measure.started(
                self._arguments, self.log, core=self._core, environment=self._environment
            )
        )

    def kill(self) -> None:
        """Ends it as a crash would."""
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        """It hangs from now on."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on."""
        self.process.send_signal(signal.SIGCONT)


class World:
    """All of it. Made by ``opened``."""

    def __init__(self, redis: Part, upstream: Part, service: Part, port: int, data: Path) -> None:
        self.redis = redis
        self.upstream = upstream
        self.service = service
        self.port = port
        self.data = data
        """The service's directory, where the spool lies."""

    @property
    def url(self) -> str:
        """Of the service."""
        return f"http://127.0.0.1:{self.port}"

    async def is_well(self, session: aiohttp.ClientSession) -> bool:
        """Whether the service has its state, and nothing waits in its spool."""
        figures = await self.figures(session)
        spool = self.data / "records.spool"
        return figures.get("sluicegate_state_up") == 1 and not spool.stat().st_size

    async def figures(self, session: aiohttp.ClientSession) -> dict[str, float]:
        """The service's metrics by name and labels; empty where it does not answer."""
        try:
            async with session.get(
                f"{self.url}/metrics", timeout=aiohttp.ClientTimeout(1.0)
            ) as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError):
            return {}
        lines = (line.rpartition(" ") for line in text.splitlines() if line[:1] != "#")
        return {name: float(value) for name, _, value in lines}


async def opened(
    stack: ExitStack,
    directory: Path,
    guard: Path,
    *,
    data: Path | None = None,
    is_private: bool = False,
    environment: Mapping[str, str] | None = None,
) -> World:
    """A world whose processes end with ``stack``.

    ``data`` is the service's directory; where state ``is_private``, the service has its own Valkey
    there, and Redis only the cache. ``environment`` is for the service and Redis.
    """
    directory.mkdir()  # noqa: ASYNC240 - nothing else runs yet
    data = data or directory / "data"
    redis_port, upstream_port, port = (measure.free_port() for _ in range(3))
    redis = Part(
        stack,
        [
            *(server_binary(), "--port", redis_port, "--bind", "127.0.0.1", "--dir", directory),
            # It keeps what it acknowledged: losing that would be no fault of the service.
            *("--save", "", "--appendonly", "yes", "--appendfsync", "always"),
        ],
        directory / "redis.log",
        measure.LOAD_CORE,
        environment,
    )
    upstream = Part(
        stack,
        [sys.executable, "-m", "benchmarks.mixed_upstream", "--port", upstream_port],
        directory / "upstream.log",
        measure.LOAD_CORE,
    )
    await measure.answers(upstream.process, upstream_port, "/v1/models", upstream.log)
    policy = directory / "policy.yaml"
    policy.write_text(_POLICY)
    url = f"redis://127.0.0.1:{redis_port}"
    settings = {**_SETTINGS, "SLUICEGATE_POLICY": str(policy), "SLUICEGATE_CACHE_URL": url}
    if not is_private:
        settings["SLUICEGATE_STATE_URL"] = url
    service = Part(
        stack,
        [
            *(sys.executable, "-m", "sluicegate", "serve", "--port", port, "--guard", guard),
            *("--upstream", f"http://127.0.0.1:{upstream_port}", "--data-directory", data),
        ],
        directory / "service.log",
        measure.SERVICE_CORE,
        {**settings, **(environment or {})},
    )
    await measure.answers(service.process, port, "/health/ready", service.log)
    return World(redis, upstream, service, port, data)


async def until_well(world: World, session: aiohttp.ClientSession, seconds: float) -> float:
    """Seconds until the service is well; ``seconds`` where it is not by then."""
    begun = time.perf_counter()
    while (taken := time.perf_counter() - begun) < seconds:
        if await world.is_well(session):
            return taken
        await asyncio.sleep(0.1)
    return seconds
