"""Runs the service: its sockets, its applications, until it is told to stop."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import AsyncExitStack, contextmanager
from typing import Any, Final

import uvicorn

from models.guard import Guard
from service.app import create_admin_app, create_app
from service.errors import ConfigurationError
from service.runtime import Runtime, open_runtime
from service.settings import ADMIN_PORT, Settings

logger = logging.getLogger(__name__)

_DRAIN_SECONDS: Final = 30
_ALLOCATIONS: Final = 20_000
"""Objects that are made between two looks for cycles of them."""
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)

Scope = MutableMapping[str, Any]
Application = Callable[[Scope, Callable[..., Awaitable[Any]], Callable[..., Awaitable[Any]]], Any]


async def serve(settings: Settings, guard: Guard | None = None) -> None:
    """Serves until SIGTERM or SIGINT. Raises ``ConfigurationError`` if it cannot start.

    ``guard`` stands in for the one that the settings name.
    """
    async with AsyncExitStack() as stack:
        # Sockets first: a port in use is found before anything is loaded.
        public = stack.enter_context(bind(settings.host, settings.port, "port"))
        admin = None
        if settings.admin_is_apart:
            port = ADMIN_PORT if settings.admin_port is None else settings.admin_port
            admin = stack.enter_context(bind(settings.admin_host, port, "admin_port"))
        runtime = await stack.enter_async_context(open_runtime(settings, guard))
        application: Any = create_app(runtime)
        sockets = [public]
        if admin is not None:
            sockets.append(admin)
            port = admin.getsockname()[1]
            application = by_port({port: create_admin_app(runtime)}, application)
        server = _Server(server_config(application))
        _announce(runtime, public, admin)
        # What was loaded to get here stays, so the collector need not look through it again.
        gc.collect()
        gc.freeze()
        # A stream makes thousands of short-lived objects: a look each 700 costs a tenth of it.
        gc.set_threshold(_ALLOCATIONS)
        await server.serve(sockets=sockets)


class _Server(uvicorn.Server):
    """Ends when it is told to, and no more than itself.

    uvicorn raises the signal again once it has stopped, which ends the process before the runtime
    around the server is closed.
    """

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Replaces uvicorn's."""
        loop = asyncio.get_running_loop()
        for signal_ in _SIGNALS:
            loop.add_signal_handler(signal_, self.handle_exit, signal_, None)
        try:
            yield
        finally:
            for signal_ in _SIGNALS:
                loop.remove_signal_handler(signal_)


def server_config(application: Application) -> uvicorn.Config:
    """How every listener is served: no websockets, no request log, no header that names us."""
    return uvicorn.Config(
        application,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_DRAIN_SECONDS,
    )


def by_port(apart: dict[int, Application], default: Application) -> Application:
    """An application that hands a request to the one whose port it came in on."""

    async def application(scope: Scope, receive: Any, send: Any) -> None:
        port = (scope.get("server") or ("", 0))[1]
        await apart.get(port, default)(scope, receive, send)

    return application


def bind(host: str, port: int, setting: str) -> socket.socket:
    """A listening socket; ``ConfigurationError`` names the setting to change."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            name = setting.replace("port", "host")
            raise ConfigurationError(
                f"{name} {host} is no address of this machine ({error.strerror})"
            ) from error
        flag = setting.replace("_", "-")
        raise ConfigurationError(
            f"{setting} {port} on {host} cannot be listened on ({error.strerror}):"
            f" give another with --{flag}"
        ) from error
    return sock


def _announce(runtime: Runtime, public: socket.socket, admin: socket.socket | None) -> None:
    settings = runtime.settings
    host, port = public.getsockname()[:2]
    logger.info("listening on http://%s:%s", host, port)
    if admin is None:
        logger.info("metrics on the same port, because it is bound to loopback")
    else:
        logger.info("metrics on http://%s:%s", *admin.getsockname()[:2])
    logger.info("guard %s on %s threads", runtime.guard.id, settings.guard_threads)
    logger.info("policy %s", runtime.policies.label)
    if not runtime.upstreams.routes:
        logger.info("no upstream: only moderation is served; set one with --upstream URL")
    for given in settings.upstreams:
        logger.info("guarding %s (%s) for %s", given.url, given.name, ", ".join(given.models))
    if settings.upstream is not None:
        logger.info("guarding %s", settings.upstream)
    for route in settings.open_routes:
        logger.warning("%s passes unscanned, as open_routes says", route)
    if not runtime.state.available:
        logger.warning("degraded: %s", runtime.state.problem)
