"""Which headers pass, and which never do."""

import pytest

from service.headers import request_headers, response_headers


def named(names: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, "value") for name in names.split())


class TestHeaders:
    def test_sent_to_the_upstream(self) -> None:
        headers = named(
            "content-type accept user-agent authorization x-api-key idempotency-key x-request-id "
            "traceparent tracestate baggage openai-organization anthropic-version "
            "x-stainless-lang x-data-parallel-rank endpoint-load-metrics-format"
        )
        assert request_headers(headers) == dict(headers)

    def test_not_sent_to_the_upstream(self) -> None:
        headers = named(
            "keep-alive te trailer transfer-encoding upgrade proxy-authorization proxy-connection "
            "host content-length content-encoding accept-encoding expect cookie origin api-key "
            "forwarded via x-forwarded-for x-forwarded-host x-real-ip x-sluicegate-key "
            "x-http-method-override x-original-url x-rewrite-url connection"
        )
        assert request_headers(headers) == {}

    def test_sent_to_the_client(self) -> None:
        headers = named(
            "content-type x-request-id request-id cache-control retry-after retry-after-ms "
            "ratelimit-limit x-ratelimit-limit-tokens openai-processing-ms "
            "anthropic-ratelimit-tokens-limit endpoint-load-metrics www-authenticate"
        )
        assert response_headers(headers) == headers

    def test_not_sent_to_the_client(self) -> None:
        headers = named(
            "keep-alive proxy-authenticate trailer upgrade transfer-encoding content-length "
            "content-encoding set-cookie server date location vary access-control-allow-origin "
            "x-sluicegate-outcome connection"
        )
        assert response_headers(headers) == ()

    def test_what_connection_names_is_for_one_connection(self) -> None:
        headers = [("x-a", "1"), ("connection", "close, X-A ,x-b"), ("x-b", "2"), ("x-c", "3")]

        assert request_headers(headers) == {"x-c": "3"}
        assert response_headers(headers) == (("x-c", "3"),)

    def test_repeated_headers(self) -> None:
        headers = [("x-a", "1"), ("accept", "*/*"), ("x-a", "2")]

        assert request_headers(headers) == {"x-a": "1, 2", "accept": "*/*"}
        assert response_headers(headers) == (("x-a", "1"), ("x-a", "2"))

    @pytest.mark.parametrize("value", ["é", "a\r\nb: c", "a\x00"])
    def test_a_value_that_would_not_stay_the_same(self, value: str) -> None:
        assert request_headers([("x-a", value)]) == {}
