"""What comes over the wire at random, to the real application before an upstream as random.

No request and no answer of an upstream may bring an error that is not one of ours, hang, be echoed
in an error, or send upstream what no guard read. The OpenAPI document is held to its word: what it
allows is never refused as malformed, and what it requires is missed.
"""

import copy
import json
import re
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fake_upstream import HELLO, Answer, FakeUpstream, Received, compact, text
from tests.guards import CANARY
from tests.service.conftest import Server, StartServer
from tests.service.test_invariants import CHAT, MESSAGES, RESPONSE, RESPONSES, nodes

JSON_TYPE = "application/json"
GRAVE = "severe-violence"
# Those of the default policy.
RULES = [
    {"direction": "prompt", "severity": "moderate", "action": "block"},
    {"direction": "response", "severity": "minor", "action": "regenerate"},
    {"action": "allow"},
]
STATUSES = {200, 400, 404, 405, 408, 413, 429, 502, 503, 504}
# --- Bodies that are well-formed, by route -----------------------------------------------------
ALL: Mapping[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "m", "prompt": ["q", "w"], "suffix": "s"},
    "/v1/responses": RESPONSES,
    "/v1/messages": MESSAGES,
    "/v1/embeddings": {"model": "m", "input": ["q", "w"]},
    "/v1/moderations": {"input": [{"type": "text", "text": "q"}]},
    "/v1/guard": {"messages": [{"role": "user", "content": "q"}]},
    "/beta/litellm_basic_guardrail_api": {
        "input_type": "request",
        "texts": ["q"],
        "structured_messages": [{"role": "user", "content": "q"}],
    },
    "/contentsafety/text:analyze": {"text": "q", "categories": ["Hate"]},
    "/contentsafety/text:shieldPrompt": {"userPrompt": "q", "documents": ["d"]},
    "/tokenize": {"model": "m", "messages": CHAT["messages"]},
    "/v1/messages/count_tokens": {"model": "m", "messages": MESSAGES["messages"]},
}
PROXIED = tuple(ALL)[:5]
COUNTED = tuple(ALL)[-2:]
# Where the newest words of a user stand.
FRESH: Mapping[str, tuple[Any, ...]] = {
    "/v1/chat/completions": ("messages", 5, "content"),
    "/v1/completions": ("prompt", 1),
    "/v1/responses": ("input", 7, "content", 0, "text"),
    "/v1/messages": ("messages", 2, "content", 0, "text"),
    "/v1/embeddings": ("input", 0),
}
ANSWERS: Mapping[str, dict[str, Any]] = {
    "/v1/completions": {"choices": [{"index": n, "text": "a"} for n in range(2)], "model": "m"},
    "/v1/responses": RESPONSE,
    "/v1/messages": {"type": "message", "role": "assistant", "content": [], "model": "m"},
    "/v1/embeddings": {"object": "list", "data": [{"index": 0, "embedding": [0.5]}], "model": "m"},
}


def at(template: Any, path: tuple[Any, ...], said: str) -> Any:
    """``template`` with ``said`` at ``path``."""
    body = copy.deepcopy(template)
    inner = body
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = said
    return body


GRAVE_ANSWERS: Mapping[str, Any] = {
    "/v1/chat/completions": {
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": f"so {GRAVE} now", "tool_calls": []},
                "finish_reason": "stop",
            }
        ]
    },
    "/v1/completions": {
        "choices": [{"index": n, "text": f"so {GRAVE} now"} for n in range(2)],
        "model": "m",
    },
    "/v1/responses": at(RESPONSE, ("output", 1, "content", 0, "text"), f"so {GRAVE} now"),
    "/v1/messages": {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": f"so {GRAVE} now"}],
        "model": "m",
    },
    "/v1/embeddings": {"object": f"so {GRAVE} now", "data": [], "model": "m"},
}
REQUIRED = [
    ("/v1/chat/completions", "model"),
    ("/v1/chat/completions", "messages"),
    ("/v1/completions", "model"),
    ("/v1/completions", "prompt"),
    ("/v1/responses", "model"),
    ("/v1/responses", "input"),
    ("/v1/messages", "model"),
    ("/v1/messages", "messages"),
    ("/v1/messages", "max_tokens"),
    ("/v1/embeddings", "model"),
    ("/v1/embeddings", "input"),
    ("/v1/moderations", "input"),
    ("/beta/litellm_basic_guardrail_api", "input_type"),
    ("/contentsafety/text:analyze", "text"),
]


class Upstream:
    """Answers well, unless it is told what to answer."""

    def __init__(self) -> None:
        self.says: Answer | None = None

    def __call__(self, received: Received) -> Answer:
        if self.says is not None:
            return self.says
        path = received.path.partition("?")[0]
        if path == "/v1/chat/completions":
            return text(HELLO)
        return Answer(body=compact(ANSWERS.get(path, {"count": 3, "tokens": [1, 2, 3]})))


UPSTREAM = Upstream()


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    # So many failures in a row are meant; a stream that stalls is not.
    return start_server(
        upstream=FakeUpstream(UPSTREAM),
        policy={"version": 1, "id": "fuzz", "rules": RULES, "regenerate": {"rounds": 1}},
        upstream_failures=10**6,
        upstream_total_seconds=5,
    )


@pytest.fixture(scope="module")
def client(server: Server) -> httpx.Client:
    return server.client(headers={"content-type": JSON_TYPE})


@pytest.fixture(scope="module")
def schemas(client: httpx.Client) -> Mapping[str, Any]:
    """The schema of each route's body, as the OpenAPI document has it."""
    paths = client.get("/openapi.json").json()["paths"]
    return {
        path: paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        for path in ALL
    }


# --- JSON at random ----------------------------------------------------------------------------
WORDS = st.sampled_from(["", " ", "q", CANARY, "how are you", "é😀", "a\nb", "\\u0000"])
NAMES = st.sampled_from(
    ["role", "content", "type", "text", "name", "input", "index", "id", "tools", "x_new", CANARY]
)
ODD: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, 0, -1, 0.5, 10**30, 1e308, "", "\0", "\ud800", CANARY, [], {}, [[]], [None]]
)
ANY: st.SearchStrategy[Any] = st.recursive(
    ODD | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
PLAIN: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=4,
)


def follows(schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """JSON values that a schema allows. Knows the words that the schemas here use."""
    unknown = schema.keys() - KEYWORDS
    assert not unknown, f"the schema says what this generator does not know: {unknown}"
    if "anyOf" in schema:
        rest = {key: value for key, value in schema.items() if key != "anyOf"}
        return st.one_of([follows(both(rest, one)) for one in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "type" not in schema:
        return PLAIN
    return st.one_of([_of_kind(kind, schema) for kind in _listed(schema["type"])])


KEYWORDS = {
    "type", "properties", "required", "items", "anyOf", "enum", "not", "minLength", "minItems",
    "maxItems", "minimum", "maximum", "additionalProperties",
}  # fmt: skip


def both(one: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema that allows what both allow."""
    merged = {**one, **other}
    for key in one.keys() & other.keys():
        mine, others = one[key], other[key]
        match key:
            case "type":
                merged[key] = [kind for kind in _listed(mine) if kind in _listed(others)]
            case "required":
                merged[key] = [*mine, *others]
            case "properties":
                shared = {name: both(mine[name], others[name]) for name in mine.keys() & others}
                merged[key] = {**mine, **others, **shared}
            case "anyOf":
                merged[key] = [both(this, that) for this in mine for that in others]
            case "items":
                merged[key] = both(mine, others)
            case "enum":
                merged[key] = [value for value in mine if value in others]
            case "minItems" | "minLength" | "minimum":
                merged[key] = max(mine, others)
            case _:
                assert mine == others, f"two schemas differ in {key}"
    return merged


def _listed(kinds: str | list[str]) -> list[str]:
    return [kinds] if isinstance(kinds, str) else kinds


def _of_kind(kind: str, schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    match kind:
        case "string":
            banned = schema.get("not", {})
            return WORDS.filter(
                lambda value: (
                    len(value) >= schema.get("minLength", 0)
                    and value not in banned.get("enum", ())
                    and not ("pattern" in banned and re.search(banned["pattern"], value))
                )
            )
        case "integer":
            least = schema.get("minimum", -9)
            return st.integers(least, min(schema.get("maximum", least + 9), least + 9))
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
        case "array":
            least, most = schema.get("minItems", 0), schema.get("maxItems", 3)
            items = follows(schema.get("items", {}))
            if items.is_empty:
                return st.just([]) if least == 0 else st.nothing()
            return st.lists(items, min_size=least, max_size=most)
        case "object":
            return _objects(schema)
    raise AssertionError(f"JSON has no type {kind}")


@st.composite
def _objects(draw: st.DrawFn, schema: Mapping[str, Any]) -> dict[str, Any]:
    properties = schema.get("properties", {})
    made = {
        key: draw(follows(inner))
        for key, inner in properties.items()
        if key in schema.get("required", ()) or draw(st.booleans())
    }
    if schema.get("additionalProperties", True):
        for key in draw(st.lists(NAMES, max_size=2, unique=True)):
            if key not in properties:
                made[key] = draw(PLAIN)
    return made


@st.composite
def mutated(draw: st.DrawFn, template: Any) -> bytes:
    """A body that was well-formed once."""
    body = copy.deepcopy(template)
    for _ in range(draw(st.integers(1, 3))):
        found = list(nodes(body))
        node = found[draw(st.integers(0, len(found) - 1))]
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            continue
        key = draw(st.sampled_from(keys))
        match draw(st.sampled_from(["drop", "retype", "wrap", "repeat", "rename"])):
            case "drop":
                del node[key]
            case "retype":
                # Some are drawn from a list of values, which must stay as they are.
                node[key] = copy.deepcopy(draw(ANY))
            case "wrap":
                node[key] = draw(st.sampled_from([[node[key]], {"content": node[key]}]))
            case "repeat" if isinstance(node, list):
                node.insert(0, copy.deepcopy(node[key]))
            case _ if isinstance(node, dict):
                node[draw(NAMES)] = node.pop(key)
    raw = json.dumps(body).encode()
    match draw(st.sampled_from(["", "", "", "", "twice", "deep", "cut", "nan", "surrogate"])):
        case "twice":
            return raw[:-1] + b', "MODEL": "x", "model": "y"}'
        case "deep":
            return raw[:-1] + b', "x": ' + b"[" * 9000 + b"]" * 9000 + b"}"
        case "cut":
            return raw[: draw(st.integers(0, len(raw)))]
        case "nan":
            return raw[:-1] + b', "top_p": NaN}'
        case "surrogate":
            return raw.replace(b'"q"', b'"\\ud800"').replace(b'"w"', b'"\xff"')
    return raw


JUNK = st.binary(max_size=40) | ANY.map(lambda value: json.dumps(value).encode())


# --- The properties ----------------------------------------------------------------------------
def checked(answer: httpx.Response) -> httpx.Response:
    """An answer that is one of ours: its status, and the shape and silence of its error."""
    assert answer.status_code in STATUSES
    if answer.status_code == 200:
        return answer
    assert CANARY not in answer.text
    shown = answer.json()
    path = answer.request.url.path
    if path.startswith("/contentsafety"):
        assert shown.keys() == {"error"}
        assert shown["error"].keys() - {"target"} == {"code", "message", "innererror"}
        return answer
    if path == "/v1/messages":
        assert shown["type"] == "error"
        assert shown["request_id"]
    else:
        assert shown.keys() == {"error"}
    assert shown["error"].keys() >= {"message", "type", "param", "code"}
    return answer


def code_of(answer: httpx.Response) -> Any:
    error = answer.json()["error"]
    return error.get("innererror", error)["code"]


@pytest.fixture
def received(server: Server) -> list[Received]:
    assert server.upstream is not None
    server.upstream.received.clear()
    UPSTREAM.says = None
    return server.upstream.received


SHARED_FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


class TestRequests:
    @pytest.mark.parametrize("path", ALL)
    def test_a_well_formed_body_is_read(
        self, client: httpx.Client, received: list[Received], path: str
    ) -> None:
        assert client.post(path, json=ALL[path]).status_code == 200

    @pytest.mark.parametrize("path", ALL)
    @settings(max_examples=12, suppress_health_check=SHARED_FIXTURES)
    @given(data=st.data())
    def test_what_the_document_allows_is_not_malformed(
        self,
        client: httpx.Client,
        schemas: Mapping[str, Any],
        received: list[Received],
        path: str,
        data: st.DataObject,
    ) -> None:
        answer = checked(client.post(path, json=data.draw(follows(schemas[path]))))
        assert answer.status_code == 200 or code_of(answer) != "invalid_request", answer.text

    @pytest.mark.parametrize(("path", "key"), REQUIRED)
    def test_what_the_document_requires_is_missed_by_name(
        self,
        client: httpx.Client,
        schemas: Mapping[str, Any],
        received: list[Received],
        path: str,
        key: str,
    ) -> None:
        branches = [schemas[path], *schemas[path].get("anyOf", ())]
        assert any(key in one.get("required", ()) for one in branches)
        body = {name: value for name, value in ALL[path].items() if name != key}
        answer = checked(client.post(path, json=body))
        error = answer.json()["error"]
        named = error["target" if path.startswith("/contentsafety") else "param"]
        assert (answer.status_code, named) == (400, key)
        assert received == []

    @pytest.mark.parametrize("path", ALL)
    @settings(max_examples=20, suppress_health_check=SHARED_FIXTURES)
    @given(data=st.data())
    def test_what_was_well_formed_once_is_read_or_refused(
        self, client: httpx.Client, received: list[Received], path: str, data: st.DataObject
    ) -> None:
        checked(client.post(path, content=data.draw(mutated(ALL[path]) | JUNK)))

    @pytest.mark.parametrize("path", PROXIED)
    @settings(max_examples=20, suppress_health_check=SHARED_FIXTURES)
    @given(data=st.data())
    def test_what_is_grave_never_reaches_the_upstream(
        self, client: httpx.Client, received: list[Received], path: str, data: st.DataObject
    ) -> None:
        received.clear()
        body = at(ALL[path], FRESH[path], f"{GRAVE} {CANARY}")
        checked(client.post(path, content=data.draw(mutated(body))))
        assert not [one for one in received if GRAVE.encode() in one.body]


class TestAnswers:
    @pytest.mark.parametrize("path", PROXIED)
    @settings(max_examples=20, suppress_health_check=SHARED_FIXTURES)
    @given(data=st.data())
    def test_what_an_upstream_says_is_judged_or_refused(
        self, client: httpx.Client, received: list[Received], path: str, data: st.DataObject
    ) -> None:
        raw = data.draw(mutated(GRAVE_ANSWERS[path]) | JUNK)
        kind = JSON_TYPE
        if data.draw(st.booleans()):
            events = data.draw(st.lists(st.just(raw) | JUNK, max_size=3))
            raw = b"".join(b"data: " + one + b"\n\n" for one in [*events, b"[DONE]"])
            kind = "text/event-stream"
        UPSTREAM.says = Answer(body=raw, content_type=kind)
        answer = checked(client.post(path, json={**ALL[path], "stream": kind != JSON_TYPE}))
        if path != "/v1/embeddings":
            assert GRAVE not in answer.text
