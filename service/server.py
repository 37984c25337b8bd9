"""Runs the service: its sockets, its applications, until it is told to stop."""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

import uvicorn

from models.guard import Guard
from service.app import create_admin_app, create_app
from service.errors import ConfigurationError
from service.runtime import Runtime, open_runtime
from service.settings import Settings

logger = logging.getLogger(__name__)

_ADMIN_PORT: Final = 8081
_DRAIN_SECONDS: Final = 30

Scope = MutableMapping[str, Any]
Application = Callable[[Scope, Callable[..., Awaitable[Any]], Callable[..., Awaitable[Any]]], Any]


async def serve(settings: Settings, guard: Guard | None = None) -> None:
    """Serves until SIGTERM or SIGINT. Raises ``ConfigurationError`` if it cannot start.

    ``guard`` stands in for the one that the settings name.
    """
    # Sockets first: a port in use is found before anything is loaded.
    public = bind(settings.host, settings.port, "port")
    admin = None
    if settings.admin_is_apart:
        port = _ADMIN_PORT if settings.admin_port is None else settings.admin_port
        admin = bind(settings.admin_host, port, "admin_port")
    async with open_runtime(settings, guard) as runtime:
        application: Any = create_app(runtime)
        sockets = [public]
        if admin is not None:
            sockets.append(admin)
            port = admin.getsockname()[1]
            application = by_port({port: create_admin_app(runtime)}, application)
        server = uvicorn.Server(
            uvicorn.Config(
                application,
                loop="uvloop",
                http="httptools",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=_DRAIN_SECONDS,
            )
        )
        _announce(runtime, public, admin)
        await server.serve(sockets=sockets)


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
    logger.info("policy %s", runtime.keeper.policy_name)
    if runtime.upstream is None:
        logger.info("no upstream: only moderation is served; set one with --upstream URL")
    else:
        logger.info("guarding %s", settings.upstream)
    if not runtime.state.available:
        logger.warning("degraded: %s", runtime.state.problem)
