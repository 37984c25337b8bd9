"""Routes of the upstream that pass without a verdict: they count or tell, and generate nothing.

Whatever is not listed here, is no dialect, and was not opened by the operator, is not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from service.body import dumps, parse_object
from service.errors import UnknownModel, Unscannable
from service.exchange import Dialect
from service.headers import response_headers
from service.metrics import Metrics
from service.policy import Policy
from service.replies import Reply
from service.routing import Upstreams
from service.upstream import UpstreamResponse

TOKENIZE: Final = "/tokenize"
DETOKENIZE: Final = "/detokenize"
COUNT_TOKENS: Final = "/v1/messages/count_tokens"
COUNTING: Final = (TOKENIZE, DETOKENIZE, COUNT_TOKENS)
VERSION: Final = "/version"
_JSON: Final = ("content-type", "application/json")


def schema(reader: Dialect | None) -> Mapping[str, Any]:
    """JSON Schema of what a counting route takes, where ``reader`` looks through its messages."""
    if reader is None:
        return {"type": "object"}
    properties = {**reader.schema["properties"], "model": {"type": ["string", "null"]}}
    return {"type": "object", "properties": properties}


@dataclass(frozen=True, slots=True)
class OpenRoute:
    """A route that the operator opened: what goes through it is neither judged nor recorded."""

    method: str
    path: str

    @classmethod
    def parse(cls, text: str) -> OpenRoute:
        """From ``POST /v1/rerank``."""
        method, _, path = text.partition(" ")
        return cls(method, path)


class Passing:
    """Passes requests on. Bodies that hold messages are looked through for what an upstream would
    fetch or run (images, templates), as a dialect reads them.
    """

    def __init__(
        self,
        upstreams: Upstreams,
        metrics: Metrics,
        readers: Mapping[str, Dialect],
        own_models: Sequence[Mapping[str, Any]],
    ) -> None:
        self._upstreams = upstreams
        self._metrics = metrics
        self._readers = readers
        self._own_models = own_models

    async def models(self, headers: Mapping[str, str]) -> Reply:
        """``GET /v1/models``: those of all upstreams, or the guard where there is none."""
        routes = self._upstreams.routes
        if not routes:
            return _listed(self._own_models)
        if len(routes) == 1 and "*" in routes[0].models:
            return _passed(await routes[0].get("/v1/models", headers))
        return _listed(await self._upstreams.models(headers))

    async def model(self, name: str, headers: Mapping[str, str]) -> Reply:
        """``GET /v1/models/{name}``, from the list: vLLM has no such route, and a name that became
        part of a path could lead to any other.
        """
        models = self._own_models
        if self._upstreams.routes:
            models = await Upstreams([self._upstreams.route(name)]).models(headers)
        for model in models:
            if model.get("id") == name:
                return _json(model)
        raise UnknownModel("no upstream has this model: see /v1/models", param="model")

    async def count(
        self, path: str, raw: bytes, headers: Mapping[str, str], policy: Policy
    ) -> Reply:
        """A route that turns texts into tokens or back, or counts them."""
        body = parse_object(raw)
        model = body.get("model")
        if "messages" in body and path in self._readers:
            # Counting asks for less than generating does.
            exchange = self._readers[path].parse({"max_tokens": 1} | body | {"model": model or "m"})
            if exchange.unscannable and policy.unscannable == "block":
                place = exchange.unscannable[0]
                raise Unscannable(f"{place} cannot be scanned by any guard here", param=place)
        is_named = isinstance(model, str) and model != ""
        route = self._upstreams.route(str(model)) if is_named else self._upstreams.first()
        return _passed(await route.post(path, raw, headers))

    async def version(self, headers: Mapping[str, str]) -> Reply:
        """``GET /version`` of the first upstream."""
        return _passed(await self._upstreams.first().get(VERSION, headers))

    async def opened(
        self, route: OpenRoute, query: str, raw: bytes, headers: Mapping[str, str]
    ) -> Reply:
        """A route that the operator opened, counted as the bypass that it is."""
        self._metrics.bypasses.labels("open_route").inc()
        path = f"{route.path}?{query}" if query else route.path
        upstream = self._upstreams.first()
        return _passed(await upstream.send(route.method, path, raw or None, headers))


def _passed(response: UpstreamResponse) -> Reply:
    return Reply(response.status, response_headers(response.headers), response.body)


def _listed(models: Sequence[Mapping[str, Any]]) -> Reply:
    return _json({"object": "list", "data": list(models)})


def _json(value: Mapping[str, Any]) -> Reply:
    return Reply(200, (_JSON,), dumps(value).encode())
