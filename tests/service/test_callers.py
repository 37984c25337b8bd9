"""Who a request is from: which credentials hold, what they open, and how refusals read."""

import asyncio
import hmac
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from service.caller import UPSTREAM_KEY, Caller, Role
from service.callers import Callers, upstream_headers
from service.errors import (
    Forbidden,
    InvalidApiKey,
    NoUpstream,
    RateLimited,
    SluicegateError,
    StateUnavailable,
)
from service.key_store import KeyStore
from service.keys import Rate, new_secret, token
from service.policies import Policies
from service.policy import Policy
from service.private_valkey import PrivateValkey
from service.rate_limits import RateLimits
from service.state import State

ROUTE = "/v1/chat/completions"
STRICT = Policy(id="strict")
SENT = {"authorization": "Bearer a", "x-api-key": "b", "api-key": "c", "accept": "d"}


class Made:
    """Callers over real keys. ``tokens`` are by the key's name."""

    def __init__(self, store: KeyStore, limits: RateLimits) -> None:
        self.store = store
        self.limits = limits
        self.tokens: dict[str, str] = {}
        self.refusals: list[str] = []

    def callers(self, **options: Any) -> Callers:
        return Callers(
            Policies(Policy(), [STRICT]),
            self.store,
            self.limits,
            refused=self.refusals.append,
            **({"required": True, "admin_required": True} | options),
        )

    async def key(self, name: str, *roles: Role, **options: Any) -> str:
        key, self.tokens[name] = await self.store.create(name, frozenset(roles), **options)
        return key.id


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateValkey]:
    valkey = PrivateValkey(tmp_path_factory.mktemp("server"), 64 * 2**20, stop_seconds=0.0)
    yield valkey
    asyncio.run(valkey.stop())


@asynccontextmanager
async def opened(
    server: PrivateValkey, directory: Path, stale_seconds: float = 3600
) -> AsyncIterator[Made]:
    state = await State.open(
        await server.start(), data_directory=directory, connect_seconds=30.0, command_seconds=30.0
    )
    async with state.connected() as redis:
        await redis.flushall()
    store = KeyStore(state, stale_seconds=stale_seconds)
    await store.start()
    yield Made(store, RateLimits(state, deadline_seconds=30.0))
    await store.close()
    await state.close()


@pytest.fixture
async def made(server: PrivateValkey, tmp_path: Path) -> AsyncIterator[Made]:
    async with opened(server, tmp_path) as one:
        await one.key("web", "caller", policy="strict")
        yield one


def bearer(credential: str) -> dict[str, str]:
    return {"authorization": f"Bearer {credential}"}


async def refusal(
    callers: Callers, headers: dict[str, str], route: str = ROUTE, role: Role = "caller"
) -> SluicegateError:
    with pytest.raises(SluicegateError) as refused:
        await callers.identify(headers, route, role)
    assert "\n" not in refused.value.message
    return refused.value


class TestCredentials:
    @pytest.mark.parametrize(
        "headers",
        [
            {"authorization": "Bearer KEY"},
            {"authorization": "bearer  KEY "},
            {"x-api-key": "KEY"},
            {"api-key": "KEY"},
            {"authorization": "Bearer sk-of-somebody-else", "x-api-key": "KEY"},
            {"authorization": "Basic dXNlcjpwYXNz", "api-key": "KEY"},
        ],
    )
    async def test_wherever_an_sdk_puts_it(self, headers: dict[str, str], made: Made) -> None:
        token = made.tokens["web"]
        shown = {name: value.replace("KEY", token) for name, value in headers.items()}
        caller = await made.callers().identify(shown, ROUTE)
        assert caller.name == "web"
        assert caller.key_id == token.split("-")[1]
        assert caller.policy.id == "strict"
        assert caller.roles == {"caller"}

    @pytest.mark.parametrize(
        ("headers", "reason"),
        [
            ({}, "missing"),
            ({"authorization": ""}, "missing"),
            ({"authorization": "Bearer "}, "missing"),
            ({"authorization": "Basic dXNlcjpwYXNz"}, "missing"),
            ({"x-api-key": ""}, "missing"),
            (bearer("sk-of-somebody-else"), "invalid"),
            (bearer("sg-"), "invalid"),
            (bearer("é" * 10_000), "invalid"),
            (bearer(token("abcdefghij", new_secret())), "invalid"),
        ],
    )
    async def test_what_is_no_key_of_ours_is_401(
        self, headers: dict[str, str], reason: str, made: Made
    ) -> None:
        error = await refusal(made.callers(), headers)
        assert isinstance(error, InvalidApiKey)
        assert (error.status, error.code) == (401, "invalid_api_key")
        assert error.headers() == {"www-authenticate": "Bearer"}
        assert made.refusals == [reason]

    async def test_a_wrong_secret_is_told_nothing_of_the_key(self, made: Made) -> None:
        identity = await made.key("gone", "caller")
        await made.store.revoke(identity)
        wrong = await refusal(made.callers(), bearer(token(identity, new_secret())))
        unknown = await refusal(made.callers(), bearer(token("abcdefghij", new_secret())))
        assert wrong.body() == unknown.body()

    async def test_an_unknown_id_costs_a_comparison_too(
        self, made: Made, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compared: list[int] = []
        compare = hmac.compare_digest

        def counted(a: str, b: str) -> bool:
            compared[-1] += 1
            return compare(a, b)

        monkeypatch.setattr(hmac, "compare_digest", counted)
        for identity in (made.tokens["web"].split("-")[1], "abcdefghij"):
            compared.append(0)
            await refusal(made.callers(), bearer(token(identity, new_secret())))
        assert compared == [2, 2]

    async def test_a_revoked_key_is_told_so(self, made: Made) -> None:
        await made.store.revoke(await made.key("gone", "caller"))
        error = await refusal(made.callers(), bearer(made.tokens["gone"]))
        assert isinstance(error, InvalidApiKey)
        assert "revoked" in error.message
        assert made.refusals == ["revoked"]

    async def test_an_expired_key_is_told_so(self, made: Made) -> None:
        await made.key("old", "caller", expires=time.time() - 1)
        error = await refusal(made.callers(), bearer(made.tokens["old"]))
        assert isinstance(error, InvalidApiKey)
        assert "expired" in error.message

    async def test_a_clock_in_the_past_keeps_no_key_alive(
        self, made: Made, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = time.time()
        await made.key("old", "caller", expires=now - 1)
        monkeypatch.setattr(time, "time", lambda: now - 7200)
        error = await refusal(made.callers(), bearer(made.tokens["old"]))
        assert "expired" in error.message

    async def test_after_a_rotation_the_old_token_holds_as_long_as_was_said(
        self, made: Made
    ) -> None:
        identity = await made.key("both", "caller")
        old = made.tokens["both"]
        _, new = await made.store.rotate(identity, keep_seconds=3600)
        for shown in (old, new):
            assert (await made.callers().identify(bearer(shown), ROUTE)).key_id == identity

        _, newest = await made.store.rotate(identity)

        assert (await made.callers().identify(bearer(newest), ROUTE)).key_id == identity
        assert "rotated" in (await refusal(made.callers(), bearer(new))).message
        assert (await refusal(made.callers(), bearer(old))).code == "invalid_api_key"


class TestGrants:
    @pytest.mark.parametrize(
        ("roles", "wanted", "may"),
        [
            (["caller"], "caller", True),
            (["caller"], "viewer", False),
            (["viewer"], "caller", False),
            (["viewer"], "viewer", True),
            (["viewer"], "publisher", False),
            (["reviewer", "publisher"], "publisher", True),
            (["reviewer", "publisher"], "admin", False),
            (["admin"], "caller", True),
            (["admin"], "viewer", True),
            (["admin"], "admin", True),
        ],
    )
    async def test_a_route_needs_its_role(
        self, roles: list[Role], wanted: Role, may: bool, made: Made
    ) -> None:
        await made.key("key", *roles)
        headers = bearer(made.tokens["key"])
        if may:
            assert (await made.callers().identify(headers, "/v1/events", wanted)).has(wanted)
        else:
            error = await refusal(made.callers(), headers, "/v1/events", wanted)
            assert isinstance(error, Forbidden)
            assert (error.status, error.code) == (403, "role_not_allowed")
            assert made.refusals == ["role"]

    async def test_a_key_opens_only_its_routes(self, made: Made) -> None:
        await made.key("narrow", "caller", routes=("/v1/moderations",))
        headers = bearer(made.tokens["narrow"])
        await made.callers().identify(headers, "/v1/moderations")
        error = await refusal(made.callers(), headers)
        assert (error.status, error.code) == (403, "route_not_allowed")
        assert made.refusals == ["route"]

    async def test_a_policy_that_is_gone_is_that_of_everybody(self, made: Made) -> None:
        await made.key("key", "caller", policy="renamed")
        caller = await made.callers().identify(bearer(made.tokens["key"]), ROUTE)
        assert caller.policy.id == Policy().id

    async def test_limits_go_with_the_answer_and_end_in_429(self, made: Made) -> None:
        await made.key("busy", "caller", limits={"*": (Rate(1, 3600),)})
        callers = made.callers()
        caller = await callers.identify(bearer(made.tokens["busy"]), ROUTE)
        assert caller.answer_headers["x-ratelimit-remaining-requests"] == "0"
        error = await refusal(callers, bearer(made.tokens["busy"]))
        assert isinstance(error, RateLimited)
        assert made.refusals == ["rate"]

    async def test_what_is_refused_anyway_counts_in_no_limit(self, made: Made) -> None:
        await made.key(
            "busy", "caller", limits={"*": (Rate(1, 3600),)}, routes=("/v1/moderations",)
        )
        callers = made.callers()
        await refusal(callers, bearer(made.tokens["busy"]))
        await callers.identify(bearer(made.tokens["busy"]), "/v1/moderations")


class TestWhereKeysAreNotRequired:
    async def test_whoever_shows_none_is_a_caller(self, made: Made) -> None:
        for headers in ({}, bearer("sk-for-the-upstream")):
            caller = await made.callers(required=False).identify(headers, ROUTE)
            assert caller == Caller(Policy())

    async def test_who_reaches_an_admin_route_may_do_all(self, made: Made) -> None:
        callers = made.callers(required=False, admin_required=False)
        assert (await callers.identify({}, "/v1/events", "viewer")).has("publisher")
        assert not (await callers.identify({}, ROUTE)).has("viewer")

    async def test_admin_routes_may_need_keys_all_the_same(self, made: Made) -> None:
        error = await refusal(made.callers(required=False), {}, "/v1/events", "viewer")
        assert isinstance(error, InvalidApiKey)

    async def test_a_key_of_ours_is_held_to_what_it_grants(self, made: Made) -> None:
        callers = made.callers(required=False, admin_required=False)
        await made.key("narrow", "caller", routes=("/v1/moderations",))
        assert (await callers.identify(bearer(made.tokens["web"]), ROUTE)).policy.id == "strict"
        await refusal(callers, bearer(made.tokens["narrow"]))
        await refusal(callers, bearer(token("abcdefghij", new_secret())))
        await refusal(callers, bearer(made.tokens["web"]), "/v1/events", "viewer")


class TestTowardsTheUpstream:
    def test_a_client_without_a_key_of_ours_shows_its_own(self) -> None:
        assert upstream_headers(SENT, Caller(Policy())) == SENT

    def test_a_key_of_ours_that_nobody_read_does_not_go_on(self) -> None:
        twice = f"Bearer sk-a, Bearer {token('abcdefghij', new_secret())}"
        sent = {"authorization": twice, "accept": "d"}
        assert upstream_headers(sent, Caller(Policy())) == {"accept": "d"}

    def test_a_key_of_ours_never_goes_on_nor_what_came_beside_it(self) -> None:
        assert upstream_headers(SENT, Caller(Policy(), "key")) == {"accept": "d"}

    async def test_the_callers_own_upstream_key_goes_in_its_place(self, made: Made) -> None:
        await made.key("team", "caller", upstream_key="team-a")
        callers = made.callers(upstream_keys={"team-a": "secret"})
        headers = bearer(made.tokens["team"])
        caller = await callers.identify(headers, ROUTE)
        assert upstream_headers(headers, caller) == {UPSTREAM_KEY: "secret"}
        assert "secret" not in repr(caller)

    async def test_one_that_is_not_set_is_not_replaced_by_another(self, made: Made) -> None:
        await made.key("team", "caller", upstream_key="team-b")
        callers = made.callers(upstream_keys={"team-a": "secret"})
        error = await refusal(callers, bearer(made.tokens["team"]))
        assert isinstance(error, NoUpstream)
        assert error.code == "upstream_key_missing"


class TestRefusals:
    async def test_are_all_counted_and_logged_once_a_minute(
        self, made: Made, caplog: pytest.LogCaptureFixture
    ) -> None:
        callers = made.callers()
        shown = token("abcdefghij", new_secret())
        for _ in range(50):
            await refusal(callers, bearer(shown))
            await refusal(callers, {})
        assert len(made.refusals) == 100
        assert len(caplog.records) == 2
        assert shown not in caplog.text
        assert "abcdefghij" not in caplog.text

    async def test_while_keys_cannot_be_checked_they_are_503(
        self, server: PrivateValkey, tmp_path: Path
    ) -> None:
        async with opened(server, tmp_path, stale_seconds=0.2) as made:
            await made.key("web", "caller")
            callers = made.callers()
            assert server.process_id is not None
            os.kill(server.process_id, signal.SIGKILL)
            async with asyncio.timeout(20):
                while made.store.age_seconds < 0.2:  # noqa: ASYNC110 - time has no event
                    await asyncio.sleep(0.01)
            error = await refusal(callers, bearer(made.tokens["web"]))
            assert isinstance(error, StateUnavailable)
            assert made.refusals == ["unavailable"]
            # Who is refused without them is refused as ever.
            assert isinstance(await refusal(callers, {}), InvalidApiKey)
