"""Kept responses: found by their owner, bounded, and turned into a conversation. A real Valkey."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import StateUnavailable
from service.private_valkey import PrivateValkey
from service.response_store import (
    INDEX,
    ResponseStore,
    Stored,
    expanded,
    inputs_of,
    items_of,
    listed,
)
from service.responses import ResponsesDialect
from service.state import State
from tests.service.test_responses import call, response, said, scanned, user

CALLED = call("{}") | {"id": "fc_1"}
REASONING = {"id": "rs_1", "type": "reasoning", "summary": []}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateValkey]:
    valkey = PrivateValkey(tmp_path_factory.mktemp("server"), 64 * 2**20, stop_seconds=0.0)
    yield valkey
    asyncio.run(valkey.stop())


@pytest.fixture
async def state(
    server: PrivateValkey, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[State]:
    opened = await State.open(await server.start(), data_directory=tmp_path_factory.getbasetemp())
    async with opened.connected() as redis:
        await redis.flushall()
    yield opened
    await opened.close()


def numbered(number: int) -> dict[str, Any]:
    return response(said("a"), id=f"resp_{number}")


async def kept_ids(store: ResponseStore, owner: str, count: int) -> list[int]:
    return [i for i in range(count) if await store.find(owner, f"resp_{i}") is not None]


class TestStore:
    async def test_what_was_kept_is_found_as_it_was(self, state: State) -> None:
        store = ResponseStore(state)
        body = response(said("café \u2028"))
        assert await store.keep("owner", body, [user("q"), said("café \u2028")])
        assert await store.find("owner", "resp_1") == Stored(body, (user("q"), said("café \u2028")))

    @pytest.mark.parametrize(
        ("owner", "identity"),
        [
            ("other", "resp_1"),
            ("owner", "resp_2"),
            ("owner", ""),
            ("owner", "resp_1" + "x" * 999),
            ("", "owner:resp_1"),
        ],
    )
    async def test_nobody_else_finds_or_deletes_it(
        self, owner: str, identity: str, state: State
    ) -> None:
        store = ResponseStore(state)
        await store.keep("owner", response(), [])
        assert await store.find(owner, identity) is None
        assert not await store.delete(owner, identity)
        assert await store.find("owner", "resp_1") is not None

    async def test_what_was_deleted_is_gone_for_good(self, state: State) -> None:
        store = ResponseStore(state)
        await store.keep("owner", response(), [])
        assert await store.delete("owner", "resp_1")
        assert not await store.delete("owner", "resp_1")
        assert await store.find("owner", "resp_1") is None
        async with state.connected() as redis:
            assert await redis.dbsize() == 0

    async def test_the_oldest_go_first_whoever_owns_them(self, state: State) -> None:
        store = ResponseStore(state, most=3)
        await store.keep("first", numbered(0), [])
        for number in range(1, 5):
            await store.keep("owner", numbered(number), [])
        assert await kept_ids(store, "first", 5) == []
        assert await kept_ids(store, "owner", 5) == [2, 3, 4]
        async with state.connected() as redis:
            assert await redis.zcard(INDEX) == 3

    async def test_one_that_is_kept_again_takes_no_second_place(self, state: State) -> None:
        store = ResponseStore(state, most=2)
        for number in (0, 1, 0, 2):
            await store.keep("owner", numbered(number), [])
        assert await kept_ids(store, "owner", 3) == [0, 2]

    async def test_a_bound_that_was_lowered_holds_at_the_next(self, state: State) -> None:
        for number in range(5):
            await ResponseStore(state, most=9).keep("owner", numbered(number), [])
        await ResponseStore(state, most=2).keep("owner", numbered(5), [])
        assert await kept_ids(ResponseStore(state), "owner", 6) == [4, 5]

    async def test_what_has_expired_is_forgotten_in_the_index_too(self, state: State) -> None:
        store = ResponseStore(state, seconds=1)
        await store.keep("owner", numbered(0), [])
        async with state.connected() as redis:
            assert 0 < await redis.pttl(f"{INDEX}:owner:resp_0") <= 1000
        await asyncio.sleep(1.1)
        assert await store.find("owner", "resp_0") is None
        await store.keep("owner", numbered(1), [])
        async with state.connected() as redis:
            assert await redis.zrange(INDEX, 0, -1) == [f"{INDEX}:owner:resp_1".encode()]

    async def test_what_is_too_large_is_not_kept(self, state: State) -> None:
        store = ResponseStore(state, most_bytes=1000)
        assert await store.keep("owner", response(id="small"), [])
        assert not await store.keep("owner", response(id="large"), [user("é" * 400)])
        assert await store.find("owner", "large") is None

    @pytest.mark.parametrize("identity", [None, "", 3, "x" * 257])
    async def test_what_has_no_id_is_not_kept(self, identity: Any, state: State) -> None:
        assert not await ResponseStore(state).keep("owner", response(id=identity), [])
        async with state.connected() as redis:
            assert await redis.dbsize() == 0

    async def test_many_at_once_stay_within_the_bound(self, state: State) -> None:
        store = ResponseStore(state, most=5)
        await asyncio.gather(*(store.keep("owner", numbered(i), []) for i in range(40)))
        assert len(await kept_ids(store, "owner", 40)) == 5

    async def test_without_state_it_says_so(self, state: State) -> None:
        store = ResponseStore(state)
        await state.close()
        with pytest.raises(StateUnavailable):
            await store.find("owner", "resp_1")
        with pytest.raises(StateUnavailable):
            await store.keep("owner", response(), [])
        with pytest.raises(StateUnavailable):
            await store.delete("owner", "resp_1")


class TestConversations:
    @pytest.mark.parametrize("given", ["more", [user("more")]])
    def test_a_request_goes_on_from_what_was_kept(self, given: Any) -> None:
        stored = Stored(response(said("a")), (user("q"), said("a")))
        body = {"model": "m", "input": given, "previous_response_id": "resp_1", "top_k": 3}
        whole = expanded(body, stored)
        assert {key: whole[key] for key in ("model", "top_k")} == {"model": "m", "top_k": 3}
        assert "previous_response_id" not in whole
        exchange = ResponsesDialect().parse(whole)
        assert scanned(exchange.fields)[:3] == [
            ("message", "prompt", "q"),
            ("text", "response", "a"),
            ("message", "prompt", "more"),
        ]
        assert body["input"] == given

    def test_the_output_follows_the_input(self) -> None:
        assert items_of({"input": "q"}, response(CALLED, said("a"))) == [
            {"type": "message", "role": "user", "content": "q"},
            CALLED,
            said("a"),
        ]

    def test_what_an_upstream_does_not_take_back_is_left_out(self) -> None:
        proven = REASONING | {"encrypted_content": "x"}
        likely = said("a")
        likely["content"][0]["logprobs"] = [{"token": "a"}]
        assert items_of({"input": []}, response(REASONING, proven, likely)) == [proven, said("a")]

    def test_a_refusal_goes_back_as_a_text(self) -> None:
        """vLLM 0.33 answers 500 to an input with a part of type ``refusal``."""
        refused = said("") | {"content": [{"type": "refusal", "refusal": "No."}]}
        assert items_of({"input": []}, response(refused)) == [said("No.")]

    @given(
        st.lists(st.sampled_from([user("q"), CALLED, said("a")]), max_size=3),
        st.lists(st.sampled_from([REASONING, CALLED, said("a")]), max_size=3),
    )
    def test_the_input_of_a_response_is_what_stands_before_its_output(
        self, given: list[dict[str, Any]], output: list[dict[str, Any]]
    ) -> None:
        body = response(*output)
        stored = Stored(body, tuple(items_of({"input": given}, body)))
        assert inputs_of(stored) == given

    def test_input_items_come_in_pages(self) -> None:
        def texts(page: dict[str, Any]) -> list[str]:
            return [part["text"] for item in page["data"] for part in item["content"]]

        given = [user(str(number)) | {"id": f"i{number}"} for number in range(4)] + [user("4")]
        stored = Stored(response(said("a")), (*given, said("a")))
        first = listed(stored, limit=2)
        assert texts(first) == ["4", "3"]
        assert (first["first_id"], first["last_id"], first["has_more"]) == ("item_4", "i3", True)
        rest = listed(stored, limit=9, after=first["last_id"])
        assert texts(rest) == ["2", "1", "0"]
        assert not rest["has_more"]
        assert texts(listed(stored, order="asc")) == list("01234")
        assert listed(Stored(response(), ()))["data"] == []

    def test_a_text_is_listed_in_a_part_of_its_speaker(self) -> None:
        given = [user("q"), {"role": "assistant", "content": "a"}, CALLED]
        shown = listed(Stored(response(), tuple(given)), order="asc")["data"]
        assert shown[0]["content"] == [{"type": "input_text", "text": "q"}]
        assert shown[1]["content"] == [{"type": "output_text", "text": "a", "annotations": []}]
        assert shown[2] == CALLED
