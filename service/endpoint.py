"""From an ASGI request to a handler and back: bodies read whole, errors rendered, cancellation.

A handler is given a ``Call``. It raises ``SluicegateError``; whoever speaks another dialect says
how an error looks in it.
"""

from __future__ import annotations

import asyncio
import logging
import re
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from fastapi import FastAPI, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from service import tracing
from service.admin_hosts import refuse_foreign
from service.body import ClientDisconnected, dumps, read_body
from service.caller import Caller, Role
from service.callers import Callers, upstream_headers
from service.errors import BadRequest, BodyTimeout, SluicegateError
from service.headers import request_headers
from service.logs import in_request
from service.metrics import Metrics
from service.records import new_id
from service.replies import Reply
from service.settings import Settings
from service.tracing import Tracer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Call:
    """A request with its whole body, and who sent it. ``id`` is the request's."""

    request: Request
    id: str
    raw: bytes
    caller: Caller

    @property
    def headers(self) -> dict[str, str]:
        """The headers that go to the upstream."""
        sent = request_headers(
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in self.request.headers.raw
        )
        return upstream_headers(sent, self.caller)


Endpoint = Callable[[Request], Awaitable[Response]]
Handler = Callable[[Call], Awaitable[Response]]
ErrorBody = Callable[[SluicegateError, str], Mapping[str, Any]]
"""From an error and a request's id to the body of the answer."""

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_UNWATCHED_SECONDS: Final = 0.02
"""How long a request may take before anybody looks whether its client is still there."""
_OBJECT: Final[Mapping[str, Any]] = {"type": "object"}


class Application(FastAPI):
    """FastAPI, with a short way to the routes that carry the load.

    Its own way to an endpoint (middleware, routing, dependencies) costs about as much as asking
    the upstream. These endpoints use nothing of it, and catch their own errors. They are declared
    to it all the same, for the schema and for what is sent to them by another method.
    """

    def __init__(self, **options: Any) -> None:
        # A redirect would be sent before any check, to whatever host the request names.
        super().__init__(redirect_slashes=False, **options)
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


def openai_error(error: SluicegateError, identity: str) -> Mapping[str, Any]:
    """The body of an error as OpenAI has it."""
    del identity
    return error.body()


class Endpoints:
    """Adds endpoints to an application."""

    def __init__(
        self,
        app: Application,
        settings: Settings,
        metrics: Metrics,
        callers: Callers,
        tracer: Tracer,
    ) -> None:
        self._app = app
        self._callers = callers
        self._tracer = tracer
        self._limit = settings.body_bytes
        self._admin_hosts = settings.admin_hosts
        self._seconds = settings.body_seconds
        self._metrics = metrics

    def post(
        self,
        path: str,
        handler: Handler,
        schema: Mapping[str, Any] = _OBJECT,
        error_body: ErrorBody = openai_error,
    ) -> None:
        """Adds a POST route that takes JSON as ``schema`` has it."""
        endpoint = self._endpoint(path, handler, error_body)
        extra = {"requestBody": {"content": {"application/json": {"schema": schema}}}}
        self._app.post(path, openapi_extra=extra, response_class=Response)(endpoint)
        self._app.posts[path] = endpoint

    def add(self, method: str, path: str, handler: Handler, role: Role = "caller") -> None:
        """Adds a route whose path may hold parameters, for callers of this role."""
        endpoint = self._endpoint(path, handler, openai_error, role)
        self._app.api_route(path, methods=[method], response_class=Response)(endpoint)

    def _endpoint(
        self, path: str, handler: Handler, error_body: ErrorBody, role: Role = "caller"
    ) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            identity = request_id(request)
            in_request(identity)
            said = {tracing.REQUEST_ID: identity}
            with self._tracer.request(path, request.headers, said) as span:
                response = await answered(request, identity)
                span.set_attribute(tracing.STATUS, response.status_code)
            response.headers["x-request-id"] = identity
            self._metrics.answered(path, response.status_code)
            return response

        async def answered(request: Request, identity: str) -> Response:
            left: Mapping[str, str] = {}
            try:
                _refuse_encoding(request)
                if role != "caller":
                    refuse_foreign(request.headers, _address(request), self._admin_hosts)
                caller = await self._callers.identify(request.headers, path, role)
                left = caller.answer_headers
                raw = await self._whole_body(request)
                call = Call(request, identity, raw, caller)
                response = await _while_connected(request, handler(call))
            except ClientDisconnected:
                # Nobody reads this; the status is what proxies log for it.
                response = Response(status_code=499)
            except Exception as error:
                ours = _ours(error, path)
                response = json_response(error_body(ours, identity), ours.status, ours.headers())
            response.headers.update(left)
            return response

        return endpoint

    async def _whole_body(self, request: Request) -> bytes:
        try:
            async with asyncio.timeout(self._seconds):
                return await read_body(request.receive, self._limit)
        except TimeoutError:
            raise BodyTimeout(
                f"the body did not come within {self._seconds:g} seconds: send it at once"
            ) from None


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """An answer of our own."""
    return Response(dumps(value).encode(), status, headers, media_type="application/json")


class _Streamed(StreamingResponse):
    """Closes what it sends when it is done with it, whatever ended it."""

    def __init__(self, stream: AsyncGenerator[bytes, None], status: int) -> None:
        super().__init__(stream, status)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._stream.aclose()


def replied(reply: Reply) -> Response:
    """The answer that a gateway's reply is."""
    response: Response
    if reply.stream is not None:
        response = _Streamed(reply.stream, reply.status)
    else:
        response = Response(reply.body, reply.status)
    response.raw_headers.extend(
        (name.encode("latin-1"), value.encode("latin-1")) for name, value in reply.headers
    )
    return response


def _address(request: Request) -> str | None:
    """The address that a connection came in on."""
    server = request.scope.get("server")
    return server[0] if server else None


def request_id(request: Request) -> str:
    """The client's id where it is one that can be shown, else a new one."""
    given = request.headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else new_id()


def _ours(error: Exception, path: str) -> SluicegateError:
    if isinstance(error, SluicegateError):
        return error
    if isinstance(error, RecursionError):
        # Just under what the parser takes, and too deep for what comes after it.
        return BadRequest("the body is nested too deeply", code="invalid_json")
    # Not the message, which may hold a client's text: where it happened is what mends it.
    place = traceback.extract_tb(error.__traceback__)[-1]
    logger.error("%s on %s at %s:%s", type(error).__name__, path, place.filename, place.lineno or 0)
    return SluicegateError("something failed here; the log says where")


async def _while_connected(request: Request, work: Awaitable[Response]) -> Response:
    """The result of ``work``, which is cancelled if the client goes away before."""
    task = asyncio.current_task()
    assert task is not None
    watch = _Watch(request, task)
    try:
        return await work
    except asyncio.CancelledError:
        # Ours to answer for if the watch did it and nobody else.
        if watch.saw_it_go and not task.uncancel():
            raise ClientDisconnected from None
        raise
    finally:
        watch.end()


class _Watch:
    """Cancels a task when its client goes away. Most are done before watching is worth a task."""

    def __init__(self, request: Request, task: asyncio.Task[Any]) -> None:
        self._request = request
        self._task = task
        self._watcher: asyncio.Task[None] | None = None
        self._start = asyncio.get_running_loop().call_later(_UNWATCHED_SECONDS, self._begin)

    @property
    def saw_it_go(self) -> bool:
        """Whether it was this that cancelled the task."""
        return self._watcher is not None and self._watcher.done()

    def end(self) -> None:
        """Watches no longer."""
        self._start.cancel()
        if self._watcher is not None:
            self._watcher.cancel()

    def _begin(self) -> None:
        self._watcher = asyncio.create_task(self._cancel_when_gone())

    async def _cancel_when_gone(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._task.cancel()


def _refuse_encoding(request: Request) -> None:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise BadRequest(
            "the body has a content-encoding: send it as it is", code="unsupported_encoding"
        )
