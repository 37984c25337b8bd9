"""API keys as values: tokens, limits, and what Redis keeps of them."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.keys import (
    ROLES,
    ApiKey,
    KeyFormatError,
    Rate,
    hashed,
    match,
    new_id,
    new_secret,
    parse_limits,
    parse_seconds,
    parse_token,
    token,
)

SECRET = new_secret()
KEY = ApiKey(
    id="abcdefghij",
    name="web shop",
    roles=frozenset({"caller"}),
    created=1000.0,
    digest=hashed(SECRET),
)
FULL = replace(
    KEY,
    roles=frozenset(ROLES),
    expires=2000.0,
    revoked=1500.0,
    policy="strict",
    upstream_key="team-a",
    routes=("/v1/moderations",),
    limits={"*": (Rate(60, 60), Rate(1000, 3600)), "/v1/guard": (Rate(5, 30),)},
    previous=hashed("old"),
    previous_until=1100.0,
)


def changed(**values: Any) -> str:
    return json.dumps(json.loads(KEY.to_json()) | values)


class TestTokens:
    def test_a_new_token_is_read_back(self) -> None:
        identity, secret = new_id(), new_secret()
        assert parse_token(token(identity, secret)) == (identity, secret)

    def test_no_two_are_alike(self) -> None:
        assert len({new_secret() for _ in range(100)} | {new_id() for _ in range(100)}) == 200

    @given(st.text() | st.from_regex(r"sg-[0-9a-z]{9,11}-[0-9A-Za-z]{42,44}", fullmatch=True))
    def test_what_is_read_is_what_would_be_written(self, text: str) -> None:
        read = parse_token(text)
        assert read is None or token(*read) == text

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "sk-abc",
            token(KEY.id, SECRET)[:-1],
            token(KEY.id, SECRET) + "a",
            token(KEY.id, SECRET) + "\n",
            token(KEY.id, SECRET).upper(),
            " " + token(KEY.id, SECRET),
            token(KEY.id, "é" * 43),
            token(KEY.id, "٣" * 43),
        ],
    )
    def test_what_is_no_token(self, text: str) -> None:
        assert parse_token(text) is None

    def test_only_its_own_secret_matches(self) -> None:
        assert match(KEY, SECRET) == "current"
        assert match(KEY, new_secret()) == "none"
        assert match(None, SECRET) == "none"

    def test_after_a_rotation_both_match_and_are_told_apart(self) -> None:
        rotated = replace(KEY, digest=hashed("new"), previous=hashed(SECRET))
        assert match(rotated, "new") == "current"
        assert match(rotated, SECRET) == "previous"

    def test_neither_the_secret_nor_its_hash_is_shown(self) -> None:
        assert SECRET not in FULL.to_json()
        for shown in (repr(FULL), json.dumps(FULL.described(0))):
            assert FULL.digest not in shown
            assert str(FULL.previous) not in shown


class TestKept:
    @pytest.mark.parametrize("key", [KEY, FULL])
    def test_a_key_comes_back_as_it_was(self, key: ApiKey) -> None:
        assert ApiKey.from_json(key.to_json()) == key

    def test_what_a_later_release_added_is_passed_over(self) -> None:
        assert ApiKey.from_json(changed(colour="red", roles=["caller", "painter"])) == KEY

    @pytest.mark.parametrize(
        "data",
        [
            "",
            "[]",
            "{}",
            "null",
            changed(version=2),
            changed(roles=["painter"]),
            changed(roles=None),
            changed(limits={"*": ["often"]}),
            changed(limits=["60/minute"]),
            changed(name=3),
            changed(id=["a"]),
            changed(id="a}b{cdefgh"),
            changed(digest=None),
            changed(digest="é" * 64),
            changed(previous="é" * 64),
            changed(roles="admin"),
            changed(created="yesterday"),
            changed(expires="never"),
            changed(expires=float("nan")),
            changed(expires=1e30),
            changed(revoked=-1),
            changed(policy=["strict"]),
            changed(upstream_key={}),
            changed(routes="/v1/guard"),
            changed(routes=[["/v1/guard"]]),
            "[" * 100_000,
        ],
    )
    def test_what_cannot_be_read_is_no_key(self, data: str) -> None:
        with pytest.raises(KeyFormatError):
            ApiKey.from_json(data)

    @pytest.mark.parametrize(
        ("key", "now", "state"),
        [
            (KEY, 1e12, "live"),
            (replace(KEY, expires=2000.0), 1999.9, "live"),
            (replace(KEY, expires=2000.0), 2000.0, "expired"),
            (FULL, 0.0, "revoked"),
        ],
    )
    def test_until_when_it_may_be_used(self, key: ApiKey, now: float, state: str) -> None:
        assert key.state(now) == state

    @pytest.mark.parametrize(
        "wrong",
        [
            {"name": ""},
            {"name": "a\nb"},
            {"name": "x" * 65},
            {"roles": frozenset()},
            {"routes": ("v1/guard",)},
            {"limits": {"guard": (Rate(1, 1),)}},
            {"limits": {"*": tuple(Rate(1, 1 + number) for number in range(17))}},
            {"limits": {"*": (Rate(60, 60), Rate(100, 60))}},
        ],
    )
    def test_a_key_that_makes_no_sense_is_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(KeyFormatError):
            replace(KEY, **wrong)


class TestLimits:
    @pytest.mark.parametrize(
        ("text", "rate"),
        [
            ("60/minute", Rate(60, 60)),
            ("1/second", Rate(1, 1)),
            ("1000/h", Rate(1000, 3600)),
            ("5/30s", Rate(5, 30)),
            ("9/31day", Rate(9, 31 * 86_400)),
        ],
    )
    def test_a_rate_is_read_and_written(self, text: str, rate: Rate) -> None:
        assert Rate.parse(text) == rate
        assert Rate.parse(str(rate)) == rate

    @pytest.mark.parametrize(
        "text", ["", "60", "0/minute", "-1/minute", "60/week", "60/0s", "1/32day", "1/minute "]
    )
    def test_what_is_no_rate(self, text: str) -> None:
        with pytest.raises(KeyFormatError):
            Rate.parse(text)

    def test_several_for_all_routes_and_for_one(self) -> None:
        assert parse_limits(["60/minute", "/v1/guard=5/second", "1000/hour"]) == {
            "*": (Rate(60, 60), Rate(1000, 3600)),
            "/v1/guard": (Rate(5, 1),),
        }

    @pytest.mark.parametrize(("text", "seconds"), [("30m", 1800), ("2d", 172_800), ("0s", 0)])
    def test_durations(self, text: str, seconds: int) -> None:
        assert parse_seconds(text) == seconds

    @pytest.mark.parametrize("text", ["", "30", "-1d", "1y", "1.5h", "999999w"])
    def test_what_is_no_duration(self, text: str) -> None:
        with pytest.raises(KeyFormatError):
            parse_seconds(text)
