"""Traces reach a collector, name what was judged and decided, and hold no text."""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from service import tracing
from service.tracing import OpenTelemetryTracer, Tracer

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """A server that takes OTLP over HTTP; its URL, and the bodies that came."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            bodies.append(body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bodies
    finally:
        server.shutdown()
        server.server_close()


def spans(bodies: list[bytes]) -> dict[str, Any]:
    """The spans that came, by name."""
    requests = [ExportTraceServiceRequest.FromString(body) for body in bodies]
    return {
        span.name: span
        for request in requests
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    }


def attributes(span: Any) -> dict[str, Any]:
    return {
        one.key: getattr(one.value, str(one.value.WhichOneof("value"))) for one in span.attributes
    }


def test_spans_stand_inside_each_other_and_go_on_the_clients_trace() -> None:
    with collector() as (url, bodies):
        tracer = OpenTelemetryTracer(url, 1.0, "0")
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        with (
            tracer.request("/v1/chat/completions", headers, {tracing.REQUEST_ID: "r1"}),
            tracer.span(tracing.JUDGEMENT, {tracing.TARGET: "input"}) as judged,
        ):
            judged.set_attribute(tracing.SCORE, 0.25)
            onward = tracer.onward({"x-a": "b"})
        tracer.close()
    found = spans(bodies)
    request, judgement = found["guard /v1/chat/completions"], found[tracing.JUDGEMENT]
    assert request.trace_id.hex() == TRACE
    assert request.parent_span_id.hex() == PARENT
    assert judgement.parent_span_id == request.span_id
    assert attributes(judgement) == {tracing.TARGET: "input", tracing.SCORE: 0.25}
    assert onward == {"x-a": "b", "traceparent": f"00-{TRACE}-{judgement.span_id.hex()}-01"}


def test_a_failed_span_says_the_kind_of_error_and_not_its_message() -> None:
    with collector() as (url, bodies):
        tracer = OpenTelemetryTracer(url, 1.0, "0")
        with pytest.raises(ValueError, match="secret"), tracer.span(tracing.UPSTREAM):
            raise ValueError("a secret text")
        tracer.close()
    (span,) = spans(bodies).values()
    assert attributes(span) == {"error.type": "ValueError"}
    assert b"secret" not in b"".join(bodies)


def test_a_text_in_the_place_of_a_models_name_is_not_told() -> None:
    with collector() as (url, bodies):
        tracer = OpenTelemetryTracer(url, 1.0, "0")
        for name, model in (("one", "org/a-model"), ("two", "how do I hide a body")):
            with tracer.span(name, {tracing.MODEL: model}):
                pass
        tracer.close()

    told = spans(bodies)
    assert attributes(told["one"])[tracing.MODEL] == "org/a-model"
    assert attributes(told["two"])[tracing.MODEL] == "(no name)"


def test_a_share_of_none_keeps_no_trace_that_begins_here() -> None:
    with collector() as (url, bodies):
        tracer = OpenTelemetryTracer(url, 0.0, "0")
        with tracer.request("/v1/guard", {}, {}):
            pass
        tracer.close()
    assert not bodies


def test_without_a_collector_nothing_is_said_and_headers_stay_as_they_are() -> None:
    tracer = Tracer()
    with tracer.request("/v1/guard", {}, {}) as span:
        span.set_attribute(tracing.SCORE, 1.0)
    headers = {"traceparent": "x"}
    assert tracer.onward(headers) is headers
