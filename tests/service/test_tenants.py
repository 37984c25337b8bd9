"""Tenants of one service, from outside: what a key opens, what it is held to, and who may look."""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from service import azure_content_safety as azure
from service import key_command, litellm_guardrail
from tests.fake_upstream import Answer, FakeUpstream, Received, compact, text
from tests.service.conftest import Server, StartServer
from tests.service.rig import BAD, REFUSAL, SAFE
from tests.service.test_responses import response, said

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
OURS, TEAM = "sk-of-the-service", "sk-of-the-team"
CONTACT = "write to ann@example.org"
ANNOTATE = {"direction": "prompt", "severity": "minor", "action": "annotate"}
KEEPS = {
    "version": 1,
    "id": "default",
    "rules": [ANNOTATE, {"action": "allow"}],
    "record": {"text": "redacted"},
}
STRICT = {
    "version": 1,
    "id": "strict",
    "rules": [ANNOTATE | {"action": "block"}, {"action": "allow"}],
}
TURN = [{"role": "user", "content": SAFE}]
ASKED: Mapping[str, dict[str, Any]] = {
    CHAT: {"model": "m", "messages": TURN},
    "/v1/completions": {"model": "m", "prompt": SAFE},
    MESSAGES: {"model": "m", "max_tokens": 9, "messages": TURN},
    RESPONSES: {"model": "m", "input": SAFE},
    "/v1/embeddings": {"model": "m", "input": SAFE},
    "/v1/moderations": {"input": SAFE},
    "/v1/guard": {"prompt": SAFE},
    litellm_guardrail.PATH: {"texts": [SAFE], "input_type": "request"},
    azure.ANALYZE_PATH: {"text": SAFE},
    azure.SHIELD_PATH: {"userPrompt": SAFE},
}


def shape_of(path: str, body: dict[str, Any]) -> tuple[str, str]:
    """The kind and our own code of an error in the shape of its route, which must hold no other."""
    error = body["error"]
    if path == MESSAGES:
        assert set(body) == {"type", "error", "request_id"}
        assert body["type"] == "error"
        return error["type"], error["code"]
    assert set(body) == {"error"}
    if path in (azure.ANALYZE_PATH, azure.SHIELD_PATH):
        assert set(error) == {"code", "message", "innererror"}
        return error["code"], error["innererror"]["code"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["type"], error["code"]


KINDS = {
    401: ("invalid_request_error", "authentication_error", "401"),
    403: ("invalid_request_error", "permission_error", "403"),
    429: ("rate_limit_error", "rate_limit_error", "TooManyRequests"),
}


def kind(path: str, status: int) -> str:
    """What clients of this route read of a status."""
    general, messages, of_azure = KINDS[status]
    if path == MESSAGES:
        return messages
    return of_azure if path.startswith("/contentsafety/") else general


def answer(received: Received) -> Answer:
    if received.path == RESPONSES:
        return Answer(body=compact(response(said("a secret of the tenant"))))
    return text("a fine answer")


class Tenants:
    """A server and the tokens of its keys, by name."""

    def __init__(self, server: Server) -> None:
        assert server.upstream is not None
        self.server = server
        self.upstream = server.upstream
        self.client = server.client()
        self.tokens: dict[str, str] = {}

    def make(self, name: str, *roles: str, **grants: Any) -> None:
        """As an operator makes a key, beside the running service."""
        settings = self.server.runtime.settings
        made = key_command.create(settings, name, roles, **grants)
        self.tokens[name] = asyncio.run(made)

    def identity(self, name: str) -> str:
        """What records call a key."""
        return self.tokens[name].split("-")[1]

    def headers(self, name: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.tokens[name]}"} if name else {}

    def post(self, name: str, path: str, /, **more: Any) -> httpx.Response:
        return self.client.post(path, json=ASKED[path] | more, headers=self.headers(name))

    def get(self, name: str, path: str, **headers: str) -> httpx.Response:
        return self.client.get(path, headers={**self.headers(name), **headers})

    def until(self, condition: Callable[[], bool]) -> None:
        """Returns when ``condition`` holds: what is written is indexed a moment later."""
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, "it did not come to hold"
            time.sleep(0.02)

    def events(self, query: str) -> list[dict[str, Any]]:
        """What a viewer finds, newest first."""
        answered = self.get("viewer", f"/v1/events?{query}")
        assert answered.status_code == 200, answered.text
        found: list[dict[str, Any]] = answered.json()["data"]
        return found


@pytest.fixture(scope="module")
def tenants(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> Tenants:
    strict: Path = tmp_path_factory.mktemp("policies") / "strict.yaml"
    strict.write_text(yaml.safe_dump(STRICT), "utf-8")
    made = Tenants(
        start_server(
            upstream=FakeUpstream(answer),
            policy=KEEPS,
            policies=(strict,),
            require_keys=True,
            upstream_key=OURS,
            upstream_keys={"team": TEAM},
        )
    )
    made.make("web", "caller", limits=["1000/hour"])
    made.make("school", "caller", policy="strict")
    made.make("team", "caller", upstream_key="team")
    made.make("narrow", "caller", routes=["/v1/batches"])
    made.make("spent", "caller", limits=["1/day"])
    made.make("viewer", "viewer")
    made.make("admin", "admin")
    made.until(lambda: made.get("admin", "/v1/audit").status_code == 200)
    # Its day's one request.
    assert made.post("spent", "/v1/guard").status_code == 200
    return made


@pytest.mark.parametrize("path", ASKED)
class TestRefused:
    """On every route, in the shape that its clients parse, before anybody is asked."""

    @pytest.fixture(autouse=True)
    def the_upstream_is_not_asked(self, tenants: Tenants) -> Iterator[None]:
        tenants.upstream.received.clear()
        yield
        assert [one.path for one in tenants.upstream.received] == []

    def refused(self, answered: httpx.Response, path: str, status: int) -> str:
        assert answered.status_code == status, answered.text
        shown, code = shape_of(path, answered.json())
        assert shown == kind(path, status)
        return code

    def test_without_a_key(self, tenants: Tenants, path: str) -> None:
        answered = tenants.post("", path)
        assert self.refused(answered, path, 401) == "invalid_api_key"
        assert answered.headers["www-authenticate"] == "Bearer"

    def test_with_a_key_of_somebody_else(self, tenants: Tenants, path: str) -> None:
        theirs = {"x-api-key": "sk-of-somebody-else"}
        answered = tenants.client.post(path, json=ASKED[path], headers=theirs)
        assert self.refused(answered, path, 401) == "invalid_api_key"
        assert "somebody-else" not in answered.text

    def test_with_a_key_for_other_routes(self, tenants: Tenants, path: str) -> None:
        assert self.refused(tenants.post("narrow", path), path, 403) == "route_not_allowed"

    def test_with_a_key_that_is_spent(self, tenants: Tenants, path: str) -> None:
        answered = tenants.post("spent", path)
        assert self.refused(answered, path, 429) == "rate_limit_exceeded"
        assert 0 < int(answered.headers["retry-after"]) <= 86_400 * 51 / 50
        assert answered.headers["x-ratelimit-limit-requests"] == "1"
        assert answered.headers["x-ratelimit-remaining-requests"] == "0"


class TestServed:
    def test_what_is_left_of_a_limit_is_said(self, tenants: Tenants) -> None:
        left = [
            int(tenants.post("web", path).headers["x-ratelimit-remaining-requests"])
            for path in (CHAT, "/v1/guard")
        ]
        assert left[0] - left[1] == 1
        assert left[0] < 1000
        assert "x-ratelimit-limit-requests" not in tenants.post("school", CHAT).headers

    def test_each_keeps_its_own_policy(self, tenants: Tenants) -> None:
        prompt = [{"role": "user", "content": BAD}]
        said = {
            name: tenants.post(name, CHAT, messages=prompt).json()["choices"][0]["message"]
            for name in ("web", "school")
        }
        assert said["web"]["content"] == "a fine answer"
        assert said["school"]["content"] == REFUSAL

    @pytest.mark.parametrize(("name", "sent"), [("web", OURS), ("team", TEAM)])
    @pytest.mark.parametrize("header", ["authorization", "x-api-key", "api-key"])
    def test_the_upstream_sees_its_own_key_and_none_of_ours(
        self, tenants: Tenants, name: str, sent: str, header: str
    ) -> None:
        tenants.upstream.received.clear()
        token = tenants.tokens[name]
        shown = {header: f"Bearer {token}" if header == "authorization" else token}
        answered = tenants.client.post(CHAT, json=ASKED[CHAT], headers=shown)
        assert answered.status_code == 200
        (received,) = tenants.upstream.received
        headers = dict(received.headers)
        assert headers["authorization"] == f"Bearer {sent}"
        assert not {"x-api-key", "api-key"} & headers.keys()
        assert token not in repr(received)

    def test_no_client_chooses_the_key_of_the_upstream(self, tenants: Tenants) -> None:
        tenants.upstream.received.clear()
        shown = {**tenants.headers("web"), "x-sluicegate-upstream-key": "sk-chosen"}
        tenants.client.post(CHAT, json=ASKED[CHAT], headers=shown)
        (received,) = tenants.upstream.received
        assert "sk-chosen" not in repr(received)

    def test_no_tenant_reads_what_another_was_told(self, tenants: Tenants) -> None:
        identity = tenants.post("web", RESPONSES).json()["id"]
        kept = f"{RESPONSES}/{identity}"
        assert tenants.get("web", kept).json()["id"] == identity
        for name in ("team", "school"):
            for path in (kept, f"{kept}/input_items"):
                assert tenants.get(name, path).status_code == 404
            deleted = tenants.client.delete(kept, headers=tenants.headers(name))
            assert deleted.status_code == 404
            gone_on = tenants.post(name, RESPONSES, previous_response_id=identity)
            assert gone_on.status_code == 404
            assert "secret" not in gone_on.text
        assert tenants.get("web", kept).status_code == 200


ADMIN = {"/v1/events": "viewer", "/v1/events/hours": "viewer", "/v1/audit": "admin"}


class TestOperators:
    @pytest.mark.parametrize(("path", "role"), ADMIN.items())
    def test_only_a_role_opens_their_routes(self, tenants: Tenants, path: str, role: str) -> None:
        assert tenants.get("", path).status_code == 401
        refused = tenants.get("web", path)
        assert refused.status_code == 403
        assert shape_of(path, refused.json())[1] == "role_not_allowed"
        assert tenants.get("viewer", path).status_code == (200 if role == "viewer" else 403)
        assert tenants.get("admin", path).status_code == 200

    def test_a_viewer_may_not_call_the_model(self, tenants: Tenants) -> None:
        assert tenants.post("viewer", CHAT).status_code == 403

    @pytest.mark.parametrize("path", ADMIN)
    @pytest.mark.parametrize(
        ("headers", "code"),
        [
            ({"host": "rebound.example"}, "host_not_allowed"),
            ({"origin": "https://evil.example"}, "origin_not_allowed"),
            ({"origin": "null"}, "origin_not_allowed"),
        ],
    )
    def test_a_foreign_page_opens_none(
        self, tenants: Tenants, path: str, headers: dict[str, str], code: str
    ) -> None:
        refused = tenants.get("admin", path, **headers)
        assert refused.status_code == 403
        assert shape_of(path, refused.json())[1] == code

    def test_their_own_page_does(self, tenants: Tenants) -> None:
        origin = tenants.server.url
        assert tenants.get("viewer", "/v1/events", origin=origin).status_code == 200

    def test_events_say_whose_they_are(self, tenants: Tenants) -> None:
        tenants.post("team", "/v1/guard")
        tenants.post("school", "/v1/moderations")
        for name, route, policy in [
            ("team", "/v1/guard", "default@1"),
            ("school", "/v1/moderations", "strict@1"),
        ]:
            query = f"key={tenants.identity(name)}&route={route}"
            tenants.until(lambda query=query: bool(tenants.events(query)))  # type: ignore[misc]
            event = tenants.events(query)[0]
            assert (event["key_id"], event["policy"]) == (tenants.identity(name), policy)
            assert not [token for token in tenants.tokens.values() if token in str(event)]

    def test_a_text_is_kept_by_policy_and_each_look_is_recorded(self, tenants: Tenants) -> None:
        kept = self.event(tenants, "team", "kept", CONTACT)
        unkept = self.event(tenants, "school", "unkept", CONTACT)

        shown = tenants.get("viewer", f"/v1/events/{kept}/text")

        assert shown.status_code == 200, shown.text
        assert shown.json()["text"] == "write to [email]"
        assert tenants.get("viewer", f"/v1/events/{unkept}/text").status_code == 404
        assert tenants.get("web", f"/v1/events/{kept}/text").status_code == 403
        acts = tenants.get("admin", "/v1/audit").json()["data"]
        looks = [(act["key"], act["action"]) for act in acts if kept in act["events"]]
        assert looks == [(tenants.identity("viewer"), "read_text")]

    def event(self, tenants: Tenants, name: str, request_id: str, said: str) -> str:
        """The id of the event of a moderation that a tenant asks for."""
        headers = {**tenants.headers(name), "x-request-id": request_id}
        asked = tenants.client.post("/v1/moderations", json={"input": said}, headers=headers)
        assert asked.status_code == 200
        query = f"request_id={request_id}"
        tenants.until(lambda: bool(tenants.events(query)))
        (event,) = tenants.events(query)
        identity: str = event["id"]
        return identity

    def test_refusals_are_counted_by_why_and_name_no_key(self, tenants: Tenants) -> None:
        before = tenants.server.sample("refused_requests_total", reason="role")
        tenants.get("web", "/v1/events")
        assert tenants.server.sample("refused_requests_total", reason="role") == before + 1
        shown = tenants.server.metrics()
        for name in tenants.tokens:
            assert tenants.identity(name) not in shown
