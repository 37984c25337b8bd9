"""Kept responses over HTTP: going on from one, reading it again, forgetting it, and whose it is."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from service import responses_stream
from tests.fake_upstream import Answer, FakeUpstream, Received, compact, error
from tests.service.conftest import Server, StartServer
from tests.service.rig import BAD, GRAVE, REFUSAL, SAFE
from tests.service.test_responses import response, said, user

PATH = "/v1/responses"
UPSTREAMS_ID = "resp_1"


def answer(text: str, identity: str = UPSTREAMS_ID) -> Callable[[Received], Answer]:
    """A response with one message, whole or as a stream, as the request asks."""

    def made(received: Received) -> Answer:
        body = response(said(text), id=identity)
        if received.json.get("stream"):
            raw = responses_stream.encoded(body)
            return Answer(body=raw, content_type="text/event-stream")
        return Answer(body=compact(body))

    return made


class Service:
    """A server before an upstream that answers by turns."""

    def __init__(self, server: Server) -> None:
        assert server.upstream is not None
        self.upstream = server.upstream
        self.client = server.client()

    def answers(self, *answers: Callable[[Received], Answer]) -> None:
        rest = list(answers)
        self.upstream.received.clear()
        self.upstream.answers = lambda received: rest.pop(0)(received)

    def create(self, given: Any = SAFE, key: str = "mine", **more: Any) -> httpx.Response:
        body = {"model": "m", "input": given} | more
        return self.client.post(PATH, json=body, headers=bearer(key))

    def created(self, *args: Any, **more: Any) -> dict[str, Any]:
        """The response that was released, from the body or from the stream's end."""
        answered = self.create(*args, **more)
        assert answered.status_code == 200, answered.text
        if not more.get("stream"):
            return parsed(answered)
        last = answered.text.rstrip().rpartition("data: ")[2]
        found: dict[str, Any] = json.loads(last)["response"]
        return found

    def read(self, identity: str, key: str = "mine", **query: str) -> httpx.Response:
        return self.client.get(f"{PATH}/{identity}", headers=bearer(key), params=query)

    @property
    def sent(self) -> list[Any]:
        """The inputs that reached the upstream."""
        return [received.json["input"] for received in self.upstream.received]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


def parsed(answered: httpx.Response) -> dict[str, Any]:
    body: dict[str, Any] = answered.json()
    return body


def code(answered: httpx.Response) -> tuple[int, str]:
    """The status and the code of an error."""
    return answered.status_code, answered.json()["error"]["code"]


NOT_FOUND = (404, "response_not_found")


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    return start_server(upstream=FakeUpstream())


@pytest.fixture
def service(server: Server) -> Iterator[Service]:
    made = Service(server)
    yield made
    made.client.delete(f"{PATH}/{UPSTREAMS_ID}", headers=bearer("mine"))


class TestWhatIsKept:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("answers", "read"),
        [([SAFE], SAFE), ([GRAVE] * 6, REFUSAL), ([BAD, "better"], "better")],
        ids=["safe", "refused", "regenerated"],
    )
    def test_is_what_was_released(
        self, service: Service, stream: bool, answers: list[str], read: str
    ) -> None:
        service.answers(*map(answer, answers))
        released = service.created(stream=stream)
        assert released["output"][0]["content"][0]["text"] == read
        shown = service.read(released["id"])
        assert (shown.status_code, parsed(shown)) == (200, released)

    @pytest.mark.parametrize("stream", [False, True])
    def test_is_gone_on_from_without_what_was_rejected(
        self, service: Service, stream: bool
    ) -> None:
        service.answers(answer(BAD), answer("better"), answer("fine", "resp_2"), answer("end"))
        first = service.created("one", stream=stream)
        second = service.created("two", previous_response_id=first["id"], stream=stream)
        service.created([user("three")], previous_response_id=second["id"])
        asked = {"type": "message", "role": "user"}
        first_turn = [{**asked, "content": "one"}, said("better")]
        second_turn = [*first_turn, {**asked, "content": "two"}]
        assert service.sent[2] == second_turn
        assert service.sent[3] == [*second_turn, said("fine"), user("three")]
        assert not any(BAD.encode() in received.body for received in service.upstream.received)
        assert all(received.json["store"] is False for received in service.upstream.received)

    def test_is_not_the_instructions_of_an_earlier_turn(self, service: Service) -> None:
        service.answers(answer("a"), answer("b"))
        first = service.created("one", instructions="Be kind.")
        service.created("two", previous_response_id=first["id"])
        assert "instructions" not in service.upstream.received[1].json

    def test_of_a_blocked_prompt_is_the_refusal_alone(self, service: Service) -> None:
        service.answers(answer("hello"), answer("fine"))
        first = service.created("one")
        blocked = service.created(GRAVE, previous_response_id=first["id"])
        assert blocked["output"][0]["content"][0]["text"] == REFUSAL
        shown = service.read(blocked["id"])
        assert parsed(shown) == blocked
        items = service.client.get(f"{PATH}/{blocked['id']}/input_items", headers=bearer("mine"))
        assert GRAVE not in shown.text + items.text
        service.created("two", previous_response_id=blocked["id"])
        asked = {"type": "message", "role": "user"}
        assert service.sent[1] == [
            {**asked, "content": "one"},
            said("hello"),
            {**asked, "content": "two"},
        ]

    @pytest.mark.parametrize("role", ["user", "assistant", "system"])
    def test_does_not_vouch_for_what_is_said_next(self, service: Service, role: str) -> None:
        service.answers(answer("hello"))
        first = service.created("one")
        harmful = [{"role": role, "content": GRAVE}]
        blocked = service.created(harmful, previous_response_id=first["id"])
        assert blocked["output"][0]["content"][0]["text"] == REFUSAL
        assert len(service.sent) == 1

    def test_lists_its_input_items(self, service: Service) -> None:
        service.answers(answer("hello"), answer("fine", "resp_2"))
        first = service.created("one")
        second = service.created("two", previous_response_id=first["id"])
        path = f"{PATH}/{second['id']}/input_items"

        def page(**query: Any) -> dict[str, Any]:
            return parsed(service.client.get(path, headers=bearer("mine"), params=query))

        def texts(**query: Any) -> list[str]:
            return [item["content"][0]["text"] for item in page(**query)["data"]]

        assert texts() == ["two", "hello", "one"]
        assert texts(order="asc", limit=2) == ["one", "hello"]
        assert texts(order="asc", after=page(order="asc", limit=2)["last_id"]) == ["two"]
        for wrong in ({"limit": "0"}, {"limit": "101"}, {"limit": "x"}, {"order": "up"}):
            answered = service.client.get(path, headers=bearer("mine"), params=wrong)
            assert code(answered) == (400, "invalid_request")

    def test_is_forgotten_when_asked(self, service: Service) -> None:
        service.answers(answer("hello"))
        made = service.created("one")["id"]
        gone = service.client.delete(f"{PATH}/{made}", headers=bearer("mine"))
        assert parsed(gone) == {"id": made, "object": "response", "deleted": True}
        assert code(service.read(made)) == NOT_FOUND
        again = service.client.delete(f"{PATH}/{made}", headers=bearer("mine"))
        assert code(again) == NOT_FOUND


class TestWhatIsNotKept:
    def kept(self, service: Service) -> bool:
        return service.read(UPSTREAMS_ID).status_code == 200

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(("store", "is_kept"), [(False, False), (True, True), (None, True)])
    def test_is_what_a_client_says(
        self, service: Service, store: bool | None, is_kept: bool, stream: bool
    ) -> None:
        service.answers(answer("hello"))
        service.created(store=store, stream=stream)
        assert self.kept(service) is is_kept
        assert service.upstream.received[0].json["store"] is False

    def test_is_a_blocked_prompts_refusal_where_a_client_says_so(self, service: Service) -> None:
        made = service.created(GRAVE, store=False)
        assert code(service.read(made["id"])) == NOT_FOUND

    def test_is_an_error_of_the_upstream(self, service: Service) -> None:
        service.answers(lambda _: error(400, "too long"))
        assert service.create().status_code == 400
        assert not self.kept(service)

    def test_is_anything_where_the_operator_says_so(self, start_server: StartServer) -> None:
        service = Service(start_server(upstream=FakeUpstream(), kept_responses=0))
        service.answers(answer("hello"))
        made = service.created()
        assert not self.kept(service)
        assert code(service.create(previous_response_id=made["id"])) == NOT_FOUND

    def test_is_more_than_the_bounds_allow(self, start_server: StartServer) -> None:
        settings = {"kept_responses": 2, "response_bytes": 4000}
        service = Service(start_server(upstream=FakeUpstream(), **settings))
        names = ["resp_1", "resp_2", "resp_3"]
        service.answers(*(answer("hello", name) for name in names), answer("w1 " * 2000, "big"))
        for name in names:
            assert service.created()["id"] == name
        assert [service.read(name).status_code for name in names] == [404, 200, 200]
        service.created()
        assert code(service.read("big")) == NOT_FOUND


class TestWhoseItIs:
    @pytest.mark.parametrize("other", ["theirs", "", "min", "mine2"])
    def test_another_credential_finds_nothing(self, service: Service, other: str) -> None:
        service.answers(answer("hello"), answer("fine"))
        made = service.created("one")["id"]
        headers, url = bearer(other), f"{PATH}/{made}"
        body = {"model": "m", "input": "two", "previous_response_id": made}
        for answered in (
            service.client.get(url, headers=headers),
            service.client.get(f"{url}/input_items", headers=headers),
            service.client.delete(url, headers=headers),
            service.client.post(PATH, json=body, headers=headers),
        ):
            assert code(answered) == NOT_FOUND
        assert len(service.upstream.received) == 1
        assert service.read(made).status_code == 200

    def test_two_with_one_id_do_not_meet(self, service: Service) -> None:
        # An upstream that was started anew may give an id again.
        service.answers(answer("for me"), answer("for them"))
        service.created(key="mine")
        service.created(key="theirs")
        for key, text in (("mine", "for me"), ("theirs", "for them")):
            shown = parsed(service.read(UPSTREAMS_ID, key))
            assert shown["output"][0]["content"][0]["text"] == text

    def test_a_key_in_the_other_header_is_one_too(self, service: Service) -> None:
        service.answers(answer("hello", "resp_key"))
        body = {"model": "m", "input": "one"}
        service.client.post(PATH, json=body, headers={"x-api-key": "k1"})
        url = f"{PATH}/resp_key"
        assert service.client.get(url, headers={"x-api-key": "k1"}).status_code == 200
        assert code(service.client.get(url, headers={"x-api-key": "k2"})) == NOT_FOUND
        assert code(service.client.get(url)) == NOT_FOUND


class TestWhatIsRefused:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("more", "expected", "param"),
        [
            ({"previous_response_id": "resp_x"}, NOT_FOUND, "previous_response_id"),
            ({"previous_response_id": ""}, NOT_FOUND, "previous_response_id"),
            (
                {"previous_response_id": 7},
                (400, "invalid_request"),
                "previous_response_id",
            ),
            ({"background": True}, (400, "background_unsupported"), "background"),
            ({"conversation": "conv_1"}, (400, "unscannable"), "conversation"),
            ({"prompt": {"id": "pmpt_1"}}, (400, "unscannable"), "prompt"),
            (
                {"input": [{"type": "item_reference", "id": "msg_1"}]},
                (400, "unscannable"),
                "input[0]",
            ),
        ],
    )
    def test_what_only_an_upstream_could_look_up(
        self,
        service: Service,
        more: dict[str, Any],
        expected: tuple[int, str],
        param: str,
        stream: bool,
    ) -> None:
        service.answers()
        answered = service.create(stream=stream, **more)
        assert code(answered) == expected
        assert parsed(answered)["error"]["param"] == param
        assert service.upstream.received == []

    def test_a_stream_of_one_that_is_kept(self, service: Service) -> None:
        service.answers(answer("hello"))
        made = service.created()["id"]
        assert code(service.read(made, stream="true")) == (400, "invalid_request")
        assert service.read(made, stream="false").status_code == 200

    def test_cancelling(self, service: Service) -> None:
        service.answers(answer("hello"))
        made = service.created()["id"]
        answered = service.client.post(f"{PATH}/{made}/cancel", headers=bearer("mine"))
        assert code(answered) == (404, "unknown_route")
        assert len(service.upstream.received) == 1

    @pytest.mark.parametrize("method", ["GET", "DELETE"])
    @pytest.mark.parametrize(
        "identity",
        [
            "a%2Fb",
            "..%2F..%2Fversion",
            "%2E%2E%2Fmodels",
            "%2Fv1%2Fmodels",
            "resp_1%2Finput_items%2Fx",
            "%00",
            "%0A",
            "*",
            "%3Fstream=true",
            "resp_1:x",
            "caf%C3%A9",
            "%FF",
            "x" * 3000,
        ],
    )
    def test_an_odd_id_is_nowhere_and_nothing_else_is_reached(
        self, service: Service, method: str, identity: str
    ) -> None:
        service.answers(answer("hello"))
        service.created()
        answered = service.client.request(method, f"{PATH}/{identity}", headers=bearer("mine"))
        assert answered.status_code == 404
        assert parsed(answered)["error"]["code"] in ("response_not_found", "unknown_route")
        assert len(service.upstream.received) == 1
        assert service.read(UPSTREAMS_ID).status_code == 200


def test_without_its_state_it_answers_and_keeps_nothing(start_server: StartServer) -> None:
    server = start_server(upstream=FakeUpstream(), state_url="redis://127.0.0.1:9")
    service = Service(server)
    service.answers(answer("hello"))
    made = service.created("one")
    assert made["output"][0]["content"][0]["text"] == "hello"
    unavailable = (503, "state_unavailable")
    assert code(service.read(made["id"])) == unavailable
    assert code(service.create("two", previous_response_id=made["id"])) == unavailable
    assert len(service.upstream.received) == 1
