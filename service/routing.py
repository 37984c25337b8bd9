"""Which upstream serves which model, and whether it is well enough to be asked."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from fnmatch import fnmatchcase
from typing import Any, Final, TypeVar

from service.body import dumps
from service.breaker import Breaker
from service.errors import (
    NoUpstream,
    UnknownModel,
    UpstreamError,
    UpstreamMalformed,
    UpstreamUnavailable,
)
from service.upstream import Upstream, UpstreamResponse, UpstreamStream

_FAILURES: Final = frozenset({502, 503, 504})
"""Statuses by which a server, or one before it, says that it cannot serve."""

_Answer = TypeVar("_Answer", UpstreamResponse, UpstreamStream)


class Route:
    """One upstream behind its breaker. ``models`` are names or patterns, as ``llama-*``.

    ``observe`` is told of each call whether it was answered.
    """

    def __init__(
        self,
        name: str,
        models: Sequence[str],
        upstream: Upstream,
        breaker: Breaker,
        observe: Callable[[str, bool], None] = lambda *_: None,
    ) -> None:
        self.name = name
        self.models = tuple(models)
        self._upstream = upstream
        self._breaker = breaker
        self._observe = observe

    @property
    def is_available(self) -> bool:
        """Whether calls pass as usual."""
        return self._breaker.is_closed

    def serves(self, model: str) -> bool:
        """Whether ``model`` is one of its."""
        return any(fnmatchcase(model, pattern) for pattern in self.models)

    async def open(self) -> None:
        """See ``Upstream.open``."""
        await self._upstream.open()

    async def close(self) -> None:
        """See ``Upstream.close``."""
        await self._upstream.close()

    async def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> UpstreamResponse:
        """See ``Upstream.post``. Raises ``UpstreamUnavailable`` while the breaker is open."""
        with self._watched() as watch:
            return watch(await self._upstream.post(path, body, headers))

    async def get(self, path: str, headers: Mapping[str, str]) -> UpstreamResponse:
        """See ``Upstream.get``. Raises as ``post`` does."""
        with self._watched() as watch:
            return watch(await self._upstream.get(path, headers))

    @asynccontextmanager
    async def stream(
        self, path: str, body: bytes, headers: Mapping[str, str]
    ) -> AsyncIterator[UpstreamStream]:
        """See ``Upstream.stream``. Raises as ``post`` does."""
        with self._watched() as watch:
            async with self._upstream.stream(path, body, headers) as answer:
                watch(answer)
                yield answer

    async def send(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> UpstreamResponse:
        """See ``Upstream.send``. Raises as ``post`` does."""
        with self._watched() as watch:
            return watch(await self._upstream.send(method, path, body, headers))

    async def detokenize(
        self, model: str, ids: Sequence[int], headers: Mapping[str, str]
    ) -> str | None:
        """The text of token ids, by vLLM's ``/detokenize``; None where the upstream has none."""
        body = dumps({"model": model, "tokens": list(ids)}).encode()
        sent = {**headers, "content-type": "application/json"}
        response = await self.post("/detokenize", body, sent)
        try:
            text = json.loads(response.body)["prompt"]
        except (ValueError, KeyError, TypeError):
            return None
        return text if response.status == 200 and isinstance(text, str) else None

    @contextmanager
    def _watched(self) -> Iterator[Callable[[_Answer], _Answer]]:
        """Lets one call pass, and learns from what comes of it."""
        left = self._breaker.remaining(time.monotonic())
        if left > 0:
            raise UpstreamUnavailable(
                f"the upstream {self.name} failed several times in a row and is left alone for now:"
                " try again later",
                left,
            )
        is_trial = not self._breaker.is_closed
        is_settled = False

        def watch(response: _Answer) -> _Answer:
            nonlocal is_settled
            is_settled = True
            self._settle(response.status not in _FAILURES)
            return response

        try:
            yield watch
        except UpstreamError as error:
            is_settled = True
            # What cannot be read was answered all the same.
            self._settle(isinstance(error, UpstreamMalformed))
            raise
        finally:
            # Of an older call that goes away while another is the trial, nothing is learnt either.
            if is_trial and not is_settled:
                self._breaker.abandoned()

    def _settle(self, is_answered: bool) -> None:
        self._observe(self.name, is_answered)
        if is_answered:
            self._breaker.succeeded()
        else:
            self._breaker.failed(time.monotonic())


class Upstreams:
    """All routes; the first that serves a model is asked."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self.routes = tuple(routes)

    def route(self, model: str) -> Route:
        """The route of ``model``. Raises ``NoUpstream`` where there is none at all, and
        ``UnknownModel``.
        """
        self.first()
        route = self._first_of(model)
        if route is not None:
            return route
        raise UnknownModel("no upstream serves this model: see /v1/models", param="model")

    def first(self) -> Route:
        """The first route, for what names no model. Raises ``NoUpstream``."""
        if not self.routes:
            raise NoUpstream(
                "no upstream is set, so there is no model to answer: start with --upstream URL"
                " (/v1/moderations and /v1/guard work without one)"
            )
        return self.routes[0]

    async def models(self, headers: Mapping[str, str]) -> list[Any]:
        """The models of all upstreams that answer, as ``/v1/models`` lists them: each by the one
        that is asked for it.

        Raises ``UpstreamError`` where none answers.
        """
        found = await asyncio.gather(
            *(self._models_of(route, headers) for route in self.routes), return_exceptions=True
        )
        lists = [one for one in found if not isinstance(one, BaseException)]
        if not lists:
            for one in found:
                if isinstance(one, BaseException):
                    raise one
        return [model for one in lists for model in one]

    async def _models_of(self, route: Route, headers: Mapping[str, str]) -> list[Any]:
        response = await route.get("/v1/models", headers)
        try:
            models = json.loads(response.body)["data"]
        except (ValueError, KeyError, TypeError):
            models = None
        if not isinstance(models, list):
            raise UpstreamMalformed("the upstream's list of models cannot be read")
        return [
            model
            for model in models
            if isinstance(model, dict) and self._first_of(str(model.get("id"))) is route
        ]

    def _first_of(self, model: str) -> Route | None:
        return next((route for route in self.routes if route.serves(model)), None)
