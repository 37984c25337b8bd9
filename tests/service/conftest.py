"""A real server: the service's applications on real sockets, on a thread and loop of its own."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import uvicorn
import uvloop
import yaml
from redis.asyncio import Redis

from models.guard import Guard
from service.app import create_admin_app, create_app
from service.private_valkey import PrivateValkey
from service.runtime import Runtime, open_runtime
from service.server import bind, by_port, server_config
from service.settings import PREFIX, Settings
from service.state import State
from tests.fake_upstream import FakeUpstream
from tests.guards import WordGuard
from tests.service.rig import MakeRig, Rig, open_rig

T = TypeVar("T")

_PATIENCE = 20.0
"""Seconds after which a test that would hang fails."""


@pytest.fixture(autouse=True, scope="session")
def no_settings_of_the_developer() -> None:
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        del os.environ[name]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateValkey]:
    """A Valkey for the tests of a file."""
    valkey = PrivateValkey(tmp_path_factory.mktemp("server"), 64 * 2**20, stop_seconds=0.0)
    yield valkey
    asyncio.run(valkey.stop())


@pytest.fixture
async def server(shared: PrivateValkey) -> PrivateValkey:
    """The same; it holds nothing and has counted nothing."""
    async with Redis.from_url(await shared.start()) as redis:
        await redis.flushall()
        await redis.config_resetstat()
    return shared


@pytest.fixture
async def url(server: PrivateValkey) -> str:
    """Where it is."""
    return await server.start()


@pytest.fixture
async def state(url: str, tmp_path: Path) -> AsyncIterator[State]:
    """Connected to it, with patience for a busy machine."""
    made = await State.open(url, data_directory=tmp_path, command_seconds=20.0)
    yield made
    await made.close()


@dataclass
class Server:
    """A running service. ``upstream`` is the fake that it guards, if it guards one."""

    url: str
    admin_url: str
    runtime: Runtime
    upstream: FakeUpstream | None
    loop: asyncio.AbstractEventLoop
    clients: ExitStack = field(default_factory=ExitStack)
    _watcher: httpx.Client | None = None

    def client(self, **options: Any) -> httpx.Client:
        """A client that is closed with the server; without patience for a server that hangs."""
        made = httpx.Client(base_url=self.url, timeout=_PATIENCE, trust_env=False, **options)
        return self.clients.enter_context(made)

    def metrics(self) -> str:
        """What Prometheus would read."""
        # Making a client is the slow part: it reads the certificates of the world.
        self._watcher = self._watcher or self.client()
        return self._watcher.get(f"{self.admin_url}/metrics").text

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``, run on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(_PATIENCE)

    def sample(self, name: str, **labels: str) -> float:
        """The value of a metric; 0 where it was never counted."""
        registry = self.runtime.metrics.registry
        return registry.get_sample_value(f"sluicegate_{name}", labels) or 0.0


StartServer = Callable[..., Server]


@pytest.fixture(scope="module")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """Starts servers that run until the module's tests have ended.

    ``policy`` is a policy file's content, ``guard`` stands in for the shipped one, a fake
    ``upstream`` is started before the service and guarded by it; the rest are settings.
    """
    with ExitStack() as stack:

        def start(
            *,
            policy: dict[str, Any] | None = None,
            guard: Guard | None = None,
            upstream: FakeUpstream | str | None = None,
            **settings: Any,
        ) -> Server:
            directory = tmp_path_factory.mktemp("server")
            if policy is not None:
                file = directory / "policy.yaml"
                file.write_text(yaml.safe_dump(policy), "utf-8")
                settings["policy"] = file
            settings = {"port": 0, "data_directory": directory / "data"} | settings
            server = _running(guard or WordGuard(), upstream, settings)
            return stack.enter_context(server)

        yield start


@contextmanager
def _running(
    guard: Guard, upstream: FakeUpstream | str | None, settings: dict[str, Any]
) -> Iterator[Server]:
    started: Future[Server] = Future()
    stop: list[Callable[[], None]] = []

    async def live() -> None:
        async with AsyncExitStack() as stack:
            fake = upstream if isinstance(upstream, FakeUpstream) else None
            if fake is not None:
                await stack.enter_async_context(fake)
            settings["upstream"] = fake.url if fake else upstream
            made = Settings(**settings)
            sockets = [bind(made.host, made.port, "port")]
            if made.admin_is_apart:
                sockets.append(bind(made.admin_host, made.admin_port or 0, "admin_port"))
            urls = ["http://{}:{}".format(*socket.getsockname()[:2]) for socket in sockets]
            runtime = await stack.enter_async_context(open_runtime(made, guard))
            application: Any = create_app(runtime)
            if made.admin_is_apart:
                port = sockets[1].getsockname()[1]
                application = by_port({port: create_admin_app(runtime)}, application)
            server = Server(urls[0], urls[-1], runtime, fake, asyncio.get_running_loop())
            uvicorn_server = _Uvicorn(
                server_config(application),
                lambda: started.set_result(server),
            )
            stop.append(lambda: setattr(uvicorn_server, "should_exit", True))
            await uvicorn_server.serve(sockets=sockets)

    def run() -> None:
        try:
            uvloop.run(live())
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=run, name="server")
    thread.start()
    try:
        server = started.result(_PATIENCE)
        try:
            yield server
        finally:
            server.clients.close()
            stop[0]()
    finally:
        thread.join(_PATIENCE)
        assert not thread.is_alive(), "the server did not stop"


class _Uvicorn(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config, listens: Callable[[], None]) -> None:
        super().__init__(config)
        self._listens = listens

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self._listens()


@pytest.fixture
def make_rig(tmp_path: Path) -> MakeRig:
    """Opens rigs whose data lies in the test's own directory."""

    def make(*arguments: Any, **options: Any) -> AbstractAsyncContextManager[Rig]:
        return open_rig(tmp_path, *arguments, **options)

    return make


@pytest.fixture
async def rig(make_rig: MakeRig) -> AsyncIterator[Rig]:
    async with make_rig() as made:
        yield made
