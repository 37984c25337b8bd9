"""The routes. Each reads a request, calls one part, and answers; no logic lives here."""

from __future__ import annotations

import asyncio
import logging
import re
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from fastapi import FastAPI, Request
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service import checks, moderations
from service.body import ClientDisconnected, dumps, parse_object, read_body
from service.chat import ChatDialect
from service.errors import (
    BadRequest,
    BodyTimeout,
    MethodNotAllowed,
    NotFound,
    SluicegateError,
)
from service.exchange import Dialect, Direction, Field
from service.gate import Outcome
from service.gateway import Incoming
from service.headers import request_headers
from service.judgement import Judgement
from service.ledger import Request as Origin
from service.policy import Action, Decision
from service.records import new_id
from service.runtime import Runtime

logger = logging.getLogger(__name__)

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_DIALECTS: Final[tuple[Dialect, ...]] = (ChatDialect(),)

Endpoint = Callable[[Request], Awaitable[Response]]
Handler = Callable[[Request, str, bytes], Awaitable[Response]]


class _Application(FastAPI):
    """FastAPI, with a short way to the routes that carry the load.

    Its own way to an endpoint (middleware, routing, dependencies) costs about as much as asking
    the upstream. These endpoints use nothing of it, and catch their own errors. They are declared
    to it all the same, for the schema and for what is sent to them by another method.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.posts: dict[str, Endpoint] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        endpoint = self.posts.get(scope["path"]) if is_post else None
        if endpoint is None:
            await super().__call__(scope, receive, send)
            return
        response = await endpoint(Request(scope, receive))
        await response(scope, receive, send)


def create_app(runtime: Runtime) -> FastAPI:
    """The public application. Metrics stand on it only where they have no listener apart."""
    app = _Application(
        title="Sluicegate", docs_url=None, redoc_url=None, summary="Moderates text, guards a model."
    )
    routes = _Routes(runtime)
    routes.add(app, "/v1/moderations", routes.moderations)
    routes.add(app, "/v1/guard", routes.guard)
    for dialect in _DIALECTS:
        routes.add(app, dialect.path, routes.proxy(dialect))
    app.get("/v1/models")(routes.models)
    _add_health(app)
    if not runtime.settings.admin_is_apart:
        _add_metrics(app, runtime)
    _add_error_handlers(app)
    return app


def create_admin_app(runtime: Runtime) -> FastAPI:
    """What operators see, on a listener of its own."""
    app = FastAPI(title="Sluicegate admin", docs_url=None, redoc_url=None)
    _add_health(app)
    _add_metrics(app, runtime)
    _add_error_handlers(app)
    return app


class _Routes:
    """Handlers over one runtime."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def add(self, app: _Application, path: str, handler: Handler) -> None:
        """Adds a POST route whose handler is given the request's id and its whole body."""
        limit = self._runtime.settings.body_bytes
        seconds = self._runtime.settings.body_seconds
        requests = self._runtime.metrics.requests

        async def endpoint(request: Request) -> Response:
            request_id = _request_id(request)
            try:
                _refuse_encoding(request)
                raw = await _whole_body(request, limit, seconds)
                response = await _while_connected(request, handler(request, request_id, raw))
            except SluicegateError as error:
                response = error_response(error)
            except ClientDisconnected:
                # Nobody reads this; the status is what proxies log for it.
                response = Response(status_code=499)
            except RecursionError:
                # Just under what the parser takes, and too deep for what comes after it.
                response = error_response(
                    BadRequest("the body is nested too deeply", code="invalid_json")
                )
            except Exception as error:
                response = _bug(error, path)
            response.headers["x-request-id"] = request_id
            requests.labels(path, response.status_code).inc()
            return response

        schema = {"requestBody": {"content": {"application/json": {"schema": {"type": "object"}}}}}
        app.post(path, openapi_extra=schema, response_class=Response)(endpoint)
        app.posts[path] = endpoint

    async def moderations(self, request: Request, request_id: str, raw: bytes) -> Response:
        """See ``moderations``."""
        guard_id = self._runtime.guard.id
        fields = moderations.parse(
            parse_object(raw), guard_id, self._runtime.settings.inputs_per_request
        )
        origin = Origin(request_id, "/v1/moderations", "moderations", guard_id)
        judged = await self._check(origin, {"prompt": fields})
        verdicts = [judgement.decision.verdict for judgement in judged["prompt"][1]]
        return _json(moderations.render(request_id, guard_id, verdicts))

    async def guard(self, request: Request, request_id: str, raw: bytes) -> Response:
        """See ``checks``."""
        guard_id = self._runtime.guard.id
        fields = checks.parse(parse_object(raw), guard_id)
        origin = Origin(request_id, "/v1/guard", "guard", guard_id)
        judged = await self._check(origin, fields)
        return _json(checks.render(request_id, guard_id, self._runtime.policy, judged))

    async def _check(
        self, origin: Origin, fields: Mapping[Direction, list[Field]]
    ) -> dict[Direction, tuple[Decision, list[Judgement]]]:
        """Judges without enforcing; leaves a record as every exchange does."""
        judge = self._runtime.judge
        ledger = self._runtime.keeper.open(origin)
        judged: dict[Direction, tuple[Decision, list[Judgement]]] = {}
        outcomes: dict[Direction, Outcome] = {}
        loop = asyncio.get_running_loop()
        try:
            for direction, asked in fields.items():
                outcomes[direction] = "error"
                started = loop.time()
                judgements = await judge.judge(direction, asked)
                ledger.judged(direction, 0, judgements, loop.time() - started)
                decision = judge.prevailing(direction, judgements)
                judged[direction] = (decision, judgements)
                is_allowed = decision.action is Action.ALLOW
                outcomes[direction] = "allowed" if is_allowed else "annotated"
        except SluicegateError:
            await ledger.close(outcomes, 0)
            raise
        await ledger.close(outcomes, 0)
        return judged

    def proxy(self, dialect: Dialect) -> Handler:
        """The handler of a dialect's route."""

        async def handler(request: Request, request_id: str, raw: bytes) -> Response:
            incoming = Incoming(
                id=request_id,
                route=dialect.path,
                raw=raw,
                body=parse_object(raw),
                headers=request_headers(_pairs(request)),
            )
            reply = await self._runtime.gateway.handle(dialect, incoming)
            response = Response(reply.body, reply.status)
            response.raw_headers.extend(
                (name.encode("latin-1"), value.encode("latin-1")) for name, value in reply.headers
            )
            return response

        return handler

    async def models(self, request: Request) -> Response:
        """The upstream's models, or the guard where there is none."""
        upstream = self._runtime.upstream
        if upstream is None:
            model = {
                "id": self._runtime.guard.id,
                "object": "model",
                "created": 0,
                "owned_by": "sluicegate",
            }
            return _named(request, _json({"object": "list", "data": [model]}))
        try:
            answer = await upstream.get("/v1/models", request_headers(_pairs(request)))
        except SluicegateError as error:
            return _named(request, error_response(error))
        shown = Response(answer.body, answer.status, media_type="application/json")
        return _named(request, shown)


def error_response(error: SluicegateError) -> Response:
    """The answer that an error is."""
    return _json(error.body(), error.status, error.headers())


def _add_health(app: FastAPI) -> None:
    @app.get("/health/live")
    async def live() -> Response:
        """The process answers."""
        return _json({"status": "live"})

    @app.get("/health/ready")
    async def ready() -> Response:
        """The guard is loaded and gave its golden scores, else there would be no listener."""
        return _json({"status": "ready"})


def _add_metrics(app: FastAPI, runtime: Runtime) -> None:
    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        text = generate_latest(runtime.metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: Exception) -> Response:
        """What the router itself refuses."""
        refusal: SluicegateError = NotFound(
            "there is no such route: see the README for those that there are"
        )
        headers: Mapping[str, str] = {}
        if isinstance(error, HTTPException) and error.status_code == 405:
            headers = error.headers or {}
            refusal = MethodNotAllowed(f"this route takes {headers.get('Allow', 'another method')}")
        response = error_response(refusal)
        response.headers.update(headers)
        return _named(request, response)


async def _whole_body(request: Request, limit: int, seconds: float) -> bytes:
    try:
        async with asyncio.timeout(seconds):
            return await read_body(request.receive, limit)
    except TimeoutError:
        raise BodyTimeout(
            f"the body did not come within {seconds:g} seconds: send it at once"
        ) from None


async def _while_connected(request: Request, work: Awaitable[Response]) -> Response:
    """The result of ``work``, which is cancelled if the client goes away before."""
    task = asyncio.current_task()
    assert task is not None
    watch = asyncio.create_task(_cancel_when_gone(request, task))
    try:
        return await work
    except asyncio.CancelledError:
        # Ours to answer for if the watch did it and nobody else.
        if watch.done() and not task.uncancel():
            raise ClientDisconnected from None
        raise
    finally:
        watch.cancel()


async def _cancel_when_gone(request: Request, task: asyncio.Task[Any]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    task.cancel()


def _bug(error: Exception, path: str) -> Response:
    # Not the message, which may hold a client's text: where it happened is what mends it.
    place = traceback.extract_tb(error.__traceback__)[-1]
    logger.error("%s on %s at %s:%s", type(error).__name__, path, place.filename, place.lineno or 0)
    return error_response(SluicegateError("something failed here; the log says where"))


def _refuse_encoding(request: Request) -> None:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise BadRequest(
            "the body has a content-encoding: send it as it is", code="unsupported_encoding"
        )


def _request_id(request: Request) -> str:
    given = request.headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else new_id()


def _named(request: Request, response: Response) -> Response:
    response.headers["x-request-id"] = _request_id(request)
    return response


def _pairs(request: Request) -> list[tuple[str, str]]:
    return [
        (name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers.raw
    ]


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(dumps(value).encode(), status, headers, media_type="application/json")
