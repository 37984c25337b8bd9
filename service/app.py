"""The routes. Each reads a request, calls one part, and answers; no logic lives here."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from fastapi import FastAPI, Request
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import Response

from service import azure_content_safety as azure
from service import checks, litellm_guardrail, moderations, passing
from service.body import parse_object
from service.chat import ChatDialect
from service.completions import CompletionsDialect
from service.embeddings import EmbeddingsDialect
from service.endpoint import (
    Application,
    Call,
    Endpoints,
    Handler,
    json_response,
    replied,
    request_id,
)
from service.errors import MethodNotAllowed, NotFound, SluicegateError
from service.exchange import Dialect, Direction, Field
from service.gate import Outcome
from service.judgement import Judgement, prevailing
from service.kept_texts import subject_of
from service.ledger import Request as Origin
from service.messages import MessagesDialect
from service.passing import OpenRoute, Passing
from service.policy import Action, Decision
from service.replies import Incoming
from service.response_routes import INPUT_ITEMS, ONE, ResponseRoutes
from service.responses import ResponsesDialect
from service.runtime import Runtime

_CHAT: Final = ChatDialect()
_MESSAGES: Final = MessagesDialect()
_RESPONSES: Final = ResponsesDialect()
_DIALECTS: Final[tuple[Dialect, ...]] = (
    _CHAT,
    CompletionsDialect(),
    _MESSAGES,
    EmbeddingsDialect(),
)
_COUNTED_AS: Final[Mapping[str, Dialect]] = {
    passing.TOKENIZE: _CHAT,
    passing.COUNT_TOKENS: _MESSAGES,
}

ANNOTATIONS_HEADER: Final = "x-sluicegate-annotations"
"""A client's header; ``azure`` asks for Azure's filter results."""


def create_app(runtime: Runtime) -> FastAPI:
    """The public application. Metrics stand on it only where they have no listener apart."""
    app = Application(
        title="Sluicegate", docs_url=None, redoc_url=None, summary="Moderates text, guards a model."
    )
    routes = _Routes(runtime)
    endpoints = _endpoints(app, runtime)
    endpoints.post("/v1/moderations", routes.moderations, moderations.SCHEMA)
    endpoints.post("/v1/guard", routes.guard, checks.SCHEMA)
    endpoints.post(litellm_guardrail.PATH, routes.litellm, litellm_guardrail.SCHEMA)
    endpoints.post(azure.ANALYZE_PATH, routes.analyze, azure.ANALYZE_SCHEMA, azure.error_body)
    endpoints.post(azure.SHIELD_PATH, routes.shield, azure.SHIELD_SCHEMA, azure.error_body)
    for dialect in _DIALECTS:
        endpoints.post(dialect.path, routes.proxy(dialect), dialect.schema, dialect.error)
    responses = _RESPONSES
    endpoints.post(responses.path, routes.respond, responses.schema, responses.error)
    endpoints.add("GET", ONE, routes.response)
    endpoints.add("DELETE", ONE, routes.forget_response)
    endpoints.add("GET", INPUT_ITEMS, routes.response_items)
    for path in passing.COUNTING:
        endpoints.post(path, routes.count(path), passing.schema(_COUNTED_AS.get(path)))
    endpoints.add("GET", "/v1/models", routes.models)
    endpoints.add("GET", "/v1/models/{name:path}", routes.model)
    endpoints.add("GET", passing.VERSION, routes.version)
    for text in runtime.settings.open_routes:
        route = OpenRoute.parse(text)
        endpoints.add(route.method, route.path, routes.opened(route))
    _add_health(app)
    if not runtime.settings.admin_is_apart:
        _add_metrics(app, runtime)
        _add_desk(endpoints, runtime)
    _add_error_handlers(app)
    return app


def create_admin_app(runtime: Runtime) -> FastAPI:
    """What operators see, on a listener of its own."""
    app = Application(title="Sluicegate admin", docs_url=None, redoc_url=None)
    _add_health(app)
    _add_metrics(app, runtime)
    _add_desk(_endpoints(app, runtime), runtime)
    _add_error_handlers(app)
    return app


class _Routes:
    """Handlers over one runtime."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        own = {"id": runtime.guard.id, "object": "model", "created": 0, "owned_by": "sluicegate"}
        self._passing = Passing(runtime.upstreams, runtime.metrics, _COUNTED_AS, [own])
        self._responses = ResponseRoutes(
            runtime.gateway, _RESPONSES, runtime.responses, runtime.hash_key
        )

    async def moderations(self, call: Call) -> Response:
        """See ``moderations``."""
        guard_id = self._runtime.guard.id
        body = parse_object(call.raw)
        fields = moderations.parse(body, guard_id, self._runtime.settings.inputs_per_request)
        subject = subject_of(body, self._runtime.hash_key)
        origin = self._origin(call, "/v1/moderations", "moderations", subject)
        judged = await self._check(origin, {"prompt": fields})
        verdicts = [judgement.decision.verdict for judgement in judged["prompt"][1]]
        return json_response(moderations.render(call.id, guard_id, verdicts))

    async def guard(self, call: Call) -> Response:
        """See ``checks``."""
        guard_id = self._runtime.guard.id
        fields = checks.parse(parse_object(call.raw), guard_id)
        origin = self._origin(call, "/v1/guard", "guard")
        judged = await self._check(origin, fields)
        return json_response(checks.render(call.id, guard_id, call.caller.policy, judged))

    async def litellm(self, call: Call) -> Response:
        """See ``litellm_guardrail``."""
        allows = call.caller.policy.unscannable == "allow"
        fields = litellm_guardrail.parse(parse_object(call.raw), allow_unscannable=allows)
        origin = self._origin(call, litellm_guardrail.PATH, "litellm")
        return json_response(litellm_guardrail.render(await self._check(origin, fields)))

    async def analyze(self, call: Call) -> Response:
        """See ``azure_content_safety``."""
        asked = azure.parse_analyze(parse_object(call.raw))
        origin = self._origin(call, azure.ANALYZE_PATH, "azure")
        judged = await self._check(origin, {"prompt": list(asked.fields)})
        (judgement,) = judged["prompt"][1]
        return json_response(azure.render_analyze(asked, judgement.decision.verdict))

    async def shield(self, call: Call) -> Response:
        """See ``azure_content_safety``."""
        asked = azure.parse_shield(parse_object(call.raw))
        origin = self._origin(call, azure.SHIELD_PATH, "azure")
        judged = await self._check(origin, {"prompt": list(asked.fields)})
        return json_response(azure.render_shield(asked, judged["prompt"][1]))

    def _incoming(self, route: str, call: Call) -> Incoming:
        body = parse_object(call.raw)
        return Incoming(
            id=call.id,
            route=route,
            raw=call.raw,
            body=body,
            headers=call.headers,
            caller=call.caller,
            subject=subject_of(body, self._runtime.hash_key),
            wants_azure=call.request.headers.get(ANNOTATIONS_HEADER) == "azure",
        )

    def _origin(self, call: Call, route: str, dialect: str, subject: str | None = None) -> Origin:
        caller, guard_id = call.caller, self._runtime.guard.id
        return Origin(call.id, route, dialect, guard_id, caller.policy, caller.key_id, subject)

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
                judgements = await judge.judge(origin.policy, direction, asked)
                ledger.judged(direction, 0, judgements, loop.time() - started)
                decision = prevailing(origin.policy, direction, judgements)
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

        async def handler(call: Call) -> Response:
            incoming = self._incoming(dialect.path, call)
            return replied(await self._runtime.gateway.handle(dialect, incoming))

        return handler

    async def respond(self, call: Call) -> Response:
        """See ``ResponseRoutes.create``."""
        incoming = self._incoming(_RESPONSES.path, call)
        return replied(await self._responses.create(incoming))

    async def response(self, call: Call) -> Response:
        """See ``ResponseRoutes.read``."""
        wanted = call.request.path_params["identity"]
        shown = await self._responses.read(
            call.caller, wanted, call.request.query_params, call.headers
        )
        return json_response(shown)

    async def forget_response(self, call: Call) -> Response:
        """See ``ResponseRoutes.delete``."""
        wanted = call.request.path_params["identity"]
        return json_response(await self._responses.delete(call.caller, wanted, call.headers))

    async def response_items(self, call: Call) -> Response:
        """See ``ResponseRoutes.input_items``."""
        wanted = call.request.path_params["identity"]
        query, headers = call.request.query_params, call.headers
        return json_response(await self._responses.input_items(call.caller, wanted, query, headers))

    def count(self, path: str) -> Handler:
        """The handler of a route that counts."""

        async def handler(call: Call) -> Response:
            return replied(
                await self._passing.count(path, call.raw, call.headers, call.caller.policy)
            )

        return handler

    def opened(self, route: OpenRoute) -> Handler:
        """The handler of a route that the operator opened."""

        async def handler(call: Call) -> Response:
            query = call.request.url.query
            return replied(await self._passing.opened(route, query, call.raw, call.headers))

        return handler

    async def models(self, call: Call) -> Response:
        """See ``Passing.models``."""
        return replied(await self._passing.models(call.headers))

    async def model(self, call: Call) -> Response:
        """See ``Passing.model``."""
        name = call.request.path_params["name"]
        return replied(await self._passing.model(name, call.headers))

    async def version(self, call: Call) -> Response:
        """See ``Passing.version``."""
        return replied(await self._passing.version(call.headers))


def _endpoints(app: Application, runtime: Runtime) -> Endpoints:
    tracer = runtime.keeper.tracer
    return Endpoints(app, runtime.settings, runtime.metrics, runtime.callers, tracer)


def _add_desk(endpoints: Endpoints, runtime: Runtime) -> None:
    parts = (runtime.event_routes, runtime.policy_routes, runtime.review_routes)
    for method, path, handler, role in (route for part in parts for route in part.all()):
        endpoints.add(method, path, handler, role)


def _add_health(app: FastAPI) -> None:
    @app.get("/health/live")
    async def live() -> Response:
        """The process answers."""
        return json_response({"status": "live"})

    @app.get("/health/ready")
    async def ready() -> Response:
        """The guard is loaded and gave its golden scores, else there would be no listener."""
        return json_response({"status": "ready"})


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
        response = json_response(refusal.body(), refusal.status, {**refusal.headers(), **headers})
        response.headers["x-request-id"] = request_id(request)
        return response
