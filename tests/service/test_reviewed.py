"""Records that a policy's rule wants looked at: which, how many, and that no answer waits."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import pytest

from models.guard import SEVERITY_COLUMNS, Logits
from models.inputs import Window
from service.policy import Action, Policy, Rule
from service.records import Record
from service.review_items import Review
from tests.fake_upstream import text
from tests.guards import WordGuard
from tests.service.event_rig import RECORD
from tests.service.rig import BAD, GRAVE, REFUSAL, SAFE, MakeRig, Rig, content

SEVERE = {"severity": "severe", "action": "block", "review": True}


def policy(*rules: dict[str, Any], **more: Any) -> Policy:
    return Policy.model_validate({"rules": [*rules, {"action": "allow"}], **more})


async def opened(rig: Rig) -> list[Review]:
    """What waits for a reviewer, once all that was asked for is there."""
    await rig.runtime.reviews.close()
    return list((await rig.runtime.reviews.open()).items)


def reviewing(rig: Rig) -> Rig:
    rig.runtime.keeper.reviews = rig.runtime.reviews
    return rig


async def test_what_a_rule_wants_reviewed_waits_for_a_reviewer(make_rig: MakeRig) -> None:
    async with make_rig(policy(SEVERE)) as rig:
        reviewing(rig)
        assert content(await rig.send(GRAVE)) == REFUSAL
        await rig.send(BAD)
        await rig.send(SAFE)

        (item,) = await opened(rig)

        (record,) = [one for one in await rig.records() if one.level == "severe"]
        assert (item.id, item.reason, item.outcome) == (record.id, "policy", "blocked")
        assert (item.level, item.categories) == ("severe", ("violence",))
        assert rig.metric("reviews_total", result="added") == 1


async def test_its_record_is_kept_whatever_the_sample(make_rig: MakeRig) -> None:
    rules = Rule(direction="prompt", action=Action.ALLOW, review=True), Rule(action=Action.ALLOW)
    seldom = Policy(rules=rules, record={"sample_passed": 1e-9})  # type: ignore[arg-type]
    async with make_rig(seldom) as rig:
        reviewing(rig)
        for number in range(5):
            await rig.send(f"{SAFE} {number}")

        items = await opened(rig)

        kept = {one.id: one for one in await rig.records()}
        assert len(items) == 5
        assert all(kept[item.id].weight == 1.0 for item in items)


async def test_one_that_a_graver_one_hides_has_a_record_of_its_own(make_rig: MakeRig) -> None:
    both = policy(
        {"categories": ["violence"], "severity": "severe", "action": "block"},
        {"severity": "minor", "action": "annotate", "review": True},
    )
    messages = [{"role": "system", "content": GRAVE}, {"role": "user", "content": BAD}]
    async with make_rig(both) as rig:
        reviewing(rig)
        await rig.send(messages=messages)

        (item,) = await opened(rig)

        assert (item.level, item.categories) == ("minor", ("insulting_behavior",))
        assert sorted(one.level or "" for one in await rig.records()) == ["minor", "severe"]


async def test_many_of_one_request_are_one_review(make_rig: MakeRig) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": GRAVE}] * 5}]
    async with make_rig(policy(SEVERE)) as rig:
        reviewing(rig)
        await rig.send(messages=messages)
        assert len(await opened(rig)) == 1


async def test_a_turn_that_was_answered_is_not_reviewed_again(make_rig: MakeRig) -> None:
    messages = [
        {"role": "user", "content": GRAVE},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": SAFE},
    ]
    async with make_rig(policy({**SEVERE, "action": "annotate"})) as rig:
        reviewing(rig)
        await rig.send(messages=messages)
        assert await opened(rig) == []


class SplitGuard(WordGuard):
    """Finds a text severe that holds both ``poison`` and ``rotten``."""

    def score(self, windows: Sequence[Window]) -> Logits:
        logits = super().score(windows)
        for row, window in enumerate(windows):
            if {"poison", "rotten"} <= set(self.words(window)):
                logits[row, SEVERITY_COLUMNS] = 5.0
        return logits


async def test_what_is_split_over_turns_is_reviewed(make_rig: MakeRig) -> None:
    messages = [
        {"role": "user", "content": "poison"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "rotten"},
    ]
    async with make_rig(policy(SEVERE), guard=SplitGuard()) as rig:
        reviewing(rig)
        await rig.send(messages=messages)
        assert [item.level for item in await opened(rig)] == ["severe"]


async def test_answers_are_reviewed_too(make_rig: MakeRig) -> None:
    async with make_rig(policy({**SEVERE, "direction": "response"})) as rig:
        reviewing(rig).answers(text(GRAVE))
        await rig.send(SAFE)

        (item,) = await opened(rig)

        assert (item.direction, item.outcome) == ("response", "blocked")


async def test_nobody_waits_for_a_review_and_what_is_too_much_is_counted(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_rig(policy(SEVERE)) as rig:
        reviews = reviewing(rig).runtime.reviews
        stuck = asyncio.Event()

        async def add(record: Record, reason: str) -> bool:
            await stuck.wait()
            return False

        monkeypatch.setattr(reviews, "add", add)
        started = time.monotonic()
        for _ in range(3):
            assert content(await rig.send(GRAVE)) == REFUSAL
        # A deadline of Redis is two seconds a command.
        assert time.monotonic() - started < 2.0

        for _ in range(1500):
            reviews.ask(RECORD, "policy")
        assert rig.metric("reviews_total", result="missed") > 0
        before = reviews.counts.missed
        await reviews.close(0.01)
        assert before < reviews.counts.missed <= 1503


async def test_what_fails_fails_no_answer_and_no_later_review(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_rig(policy(SEVERE)) as rig:
        reviews = reviewing(rig).runtime.reviews
        add = reviews.add

        async def failing(record: Record, reason: Any) -> bool:
            monkeypatch.setattr(reviews, "add", add)
            raise RuntimeError

        monkeypatch.setattr(reviews, "add", failing)
        assert content(await rig.send(GRAVE)) == REFUSAL
        assert content(await rig.send(GRAVE)) == REFUSAL

        assert len(await opened(rig)) == 1
        assert reviews.counts.missed == 1


async def test_without_such_a_rule_nothing_is_reviewed(make_rig: MakeRig) -> None:
    async with make_rig() as rig:
        reviewing(rig)
        await rig.send(GRAVE)
        assert await opened(rig) == []
