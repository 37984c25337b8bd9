"""Traces: what a span is called and what it says; OpenTelemetry behind it where it is wanted.

A request is a span; inside it each judgement is one, and each attempt at an answer, with the
upstream's call in it. The names are those of OpenTelemetry's conventions for generative AI, as
proposed for guardrails (semantic-conventions-genai, 2026): they may change, and stand nowhere else.
No span holds a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final, Protocol

from service.errors import ConfigurationError
from service.logs import named

REQUEST: Final = "guard {route}"
JUDGEMENT: Final = "run_guardrail"
UPSTREAM: Final = "upstream"

OPERATION: Final = "gen_ai.operation.name"
GUARD: Final = "gen_ai.guardrail.component.name"
TARGET: Final = "gen_ai.guardrail.target.type"
VERDICT: Final = "gen_ai.guardrail.verdict.type"
ACTION: Final = "gen_ai.guardrail.action.type"
POLICY: Final = "gen_ai.guardrail.security.policy.id"
CATEGORY: Final = "gen_ai.guardrail.security.risk.category"
SCORE: Final = "gen_ai.guardrail.security.risk.score"
MODEL: Final = "gen_ai.request.model"
UPSTREAM_NAME: Final = "sluicegate.upstream"
ATTEMPT: Final = "sluicegate.attempt"
FIELDS: Final = "sluicegate.fields"
ROUTE: Final = "http.route"
STATUS: Final = "http.response.status_code"
REQUEST_ID: Final = "sluicegate.request_id"
OUTCOME: Final = "sluicegate.outcome"

TARGETS: Final[Mapping[str, str]] = {"prompt": "input", "response": "output"}

Value = str | int | float | bool


class Span(Protocol):
    """A span that has begun."""

    def set_attribute(self, key: str, value: Value) -> object:
        """Says one thing more."""


class _Nothing:
    def set_attribute(self, key: str, value: Value) -> None:
        """Says it to nobody."""


_NOTHING: Final = _Nothing()
_UNTRACED: Final = nullcontext(_NOTHING)


class Tracer:
    """Traces nothing, which costs nothing. ``OpenTelemetryTracer`` does."""

    def span(
        self, name: str, attributes: Mapping[str, Value] | None = None
    ) -> AbstractContextManager[Span]:
        """A span around what is done inside; one of an exception is marked as failed."""
        del name, attributes
        return _UNTRACED

    def request(
        self, route: str, headers: Mapping[str, str], attributes: Mapping[str, Value]
    ) -> AbstractContextManager[Span]:
        """The span of a request, which goes on a trace that ``headers`` name (W3C)."""
        del route, headers, attributes
        return _UNTRACED

    def onward(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """``headers`` for an upstream, with the trace that they belong to."""
        return headers

    def close(self) -> None:
        """Sends what waits to be sent."""


class OpenTelemetryTracer(Tracer):
    """Sends spans to a collector (OTLP over HTTP), in the background and bounded."""

    def __init__(self, endpoint: str, share: float, version: str) -> None:
        """``endpoint`` is as ``http://127.0.0.1:4318``; ``share`` of the traces that begin here are
        kept. Raises ``ConfigurationError`` where the extra ``tracing`` is not installed.
        """
        try:
            from opentelemetry import context, propagate, trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        except ImportError as error:
            raise ConfigurationError(
                "trace_endpoint needs OpenTelemetry: pip install 'sluicegate[tracing]'"
            ) from error
        self._context, self._propagate, self._trace = context, propagate, trace
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "sluicegate", "service.version": version}),
            sampler=ParentBased(TraceIdRatioBased(share)),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=5)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("sluicegate", version)

    @contextmanager
    def span(self, name: str, attributes: Mapping[str, Value] | None = None) -> Iterator[Span]:
        """See ``Tracer.span``."""
        with self._spanned(name, attributes, None) as span:
            yield span

    @contextmanager
    def request(
        self, route: str, headers: Mapping[str, str], attributes: Mapping[str, Value]
    ) -> Iterator[Span]:
        """See ``Tracer.request``."""
        parent = self._propagate.extract(headers)
        name = REQUEST.format(route=route)
        with self._spanned(name, {ROUTE: route, **attributes}, parent) as span:
            yield span

    def onward(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """See ``Tracer.onward``."""
        carrier = dict(headers)
        self._propagate.inject(carrier)
        return carrier

    def close(self) -> None:
        """See ``Tracer.close``."""
        self._provider.shutdown()

    @contextmanager
    def _spanned(
        self, name: str, attributes: Mapping[str, Value] | None, parent: Any
    ) -> Iterator[Span]:
        said = dict(attributes or {})
        if MODEL in said:
            said[MODEL] = named(str(said[MODEL]))
        # An exception's message may hold what it was about: its kind alone is said.
        with self._tracer.start_as_current_span(
            name,
            context=parent,
            attributes=said,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield span
            except Exception as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(self._trace.StatusCode.ERROR)
                raise
