"""What reviewers said, exported as examples that training reads. A real Valkey."""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from service.labels import STREAM, ExportCounts, Label, Labels
from service.records import Record
from service.reviews import Reviews
from tests.service.event_rig import RECORD, Kept, kept, scores
from training.labelled import read_examples

PROMPT = replace(RECORD, id="1" * 32, level="moderate", category_scores=scores("drugs"))
ANSWER = replace(PROMPT, id="2" * 32, direction="response", field="choices[0].message.content")


@dataclass
class Desk:
    """Where reviewers sit."""

    kept: Kept
    reviews: Reviews
    labels: Labels

    async def decide(self, record: Record, text: str | None, severity: str = "severe") -> None:
        """A record that is reviewed, and its text where it is kept."""
        await self.kept.write(record)
        if text is not None:
            await self.kept.texts.keep(record.id, text, "full", record.subject)
        await self.reviews.add(record, "policy")
        categories = [] if severity == "none" else ["drugs"]
        outcome: Any = "overturned" if severity == "none" else "confirmed"
        await self.reviews.resolve(record.id, "ann", outcome, severity, categories)

    async def export(self, counts: ExportCounts | None = None) -> list[dict[str, Any]]:
        return [json.loads(line) async for line in self.labels.export("key-a", counts)]


@pytest.fixture
async def desk(url: str, tmp_path: Path) -> AsyncIterator[Desk]:
    options = {"most_characters": 40}
    async with kept(url, tmp_path, texts=options) as made:
        labels = Labels(made.state, made.events, made.texts)
        yield Desk(made, Reviews(made.state), labels)


async def add(desk: Desk, **values: Any) -> None:
    """What another release might have written."""
    async with desk.kept.state.connected() as redis:
        found: Any = await redis.xrevrange(STREAM, count=1)
        data = json.loads(found[0][1][b"data"]) | values
        await redis.xadd(STREAM, {"data": json.dumps(data)})


async def test_examples_have_the_texts_and_what_reviewers_said(desk: Desk) -> None:
    await desk.decide(PROMPT, "how to?", "none")
    await desk.decide(ANSWER, "so", "minor")

    assert await desk.export() == [
        {
            "id": PROMPT.id,
            "source": "reviews",
            "role": "prompt",
            "prompt": "how to?",
            "unsafe": False,
            "severity": 0,
            "categories": None,
            "pku_categories": [],
            "refusal": None,
        },
        {
            "id": ANSWER.id,
            "source": "reviews",
            "role": "response",
            "prompt": "how to?",
            "response": "so",
            "unsafe": True,
            "severity": 1,
            "categories": None,
            "pku_categories": ["drugs"],
            "refusal": None,
        },
    ]


async def test_training_reads_what_is_exported(desk: Desk, tmp_path: Path) -> None:
    await desk.decide(PROMPT, "a line\nand \u2028 another \ud83d", "none")
    await desk.decide(ANSWER, "x" * 100)
    file = tmp_path / "labels.jsonl"
    file.write_bytes(b"".join([line async for line in desk.labels.export(None)]))

    prompt, answer = read_examples(file)

    assert prompt.severity == 0
    assert (answer.severity, answer.pku_categories) == (3, ("drugs",))
    assert answer.guard_input().role == "response"


async def test_a_text_that_was_cut_is_marked(desk: Desk) -> None:
    await desk.decide(ANSWER, "x" * 100)
    (example,) = await desk.export()
    assert example["response"] == "x" * 40
    assert example["judged_in_part"] is True


async def test_labels_whose_text_was_not_kept_or_was_deleted_are_no_examples(desk: Desk) -> None:
    await desk.decide(PROMPT, None)
    await desk.decide(replace(ANSWER, subject="ab" * 16), "so")
    await desk.kept.texts.delete_subject("ab" * 16, None)

    counts = ExportCounts()

    assert await desk.export(counts) == []
    assert counts == ExportCounts(without_text=2)
    assert len([label async for label in desk.labels.all()]) == 2


async def test_no_text_is_in_the_stream(desk: Desk) -> None:
    await desk.decide(PROMPT, "how to?")
    async with desk.kept.state.connected() as redis:
        found: Any = await redis.xrange(STREAM)
    assert len(found) == 1
    assert b"how to?" not in found[0][1][b"data"]


async def test_an_answer_whose_prompt_is_not_known_for_sure_has_none(desk: Desk) -> None:
    await desk.decide(ANSWER, "so")
    (example,) = await desk.export()
    assert example["prompt"] == ""

    # Two requests that a client gave the same id.
    await desk.decide(PROMPT, "one")
    await desk.decide(replace(PROMPT, id="3" * 32), "two")
    assert (await desk.export())[0]["prompt"] == ""


async def test_every_text_that_is_read_is_recorded(desk: Desk) -> None:
    await desk.decide(PROMPT, "how to?")
    await desk.decide(ANSWER, "so")
    await desk.export()
    acts, _ = await desk.kept.audit.list()
    looks = [(act.key_id, act.record_ids) for act in acts if act.action == "read_text"]
    assert sorted(looks) == [
        ("key-a", (PROMPT.id,)),
        ("key-a", (PROMPT.id,)),
        ("key-a", (ANSWER.id,)),
    ]


async def test_what_is_known_already_is_not_read_again(desk: Desk) -> None:
    await desk.decide(PROMPT, "how to?")
    await desk.decide(ANSWER, "so")
    counts = ExportCounts()
    lines = [line async for line in desk.labels.export("key-a", counts, known={PROMPT.id})]
    assert [json.loads(line)["id"] for line in lines] == [ANSWER.id]
    assert counts == ExportCounts(examples=1, known=1)


async def test_more_labels_than_a_page_come_in_order_and_from_a_time_on(desk: Desk) -> None:
    await desk.decide(PROMPT, None)
    for number in range(450):
        await add(desk, id=f"{number}", colour="red")
    found = [label.id async for label in desk.labels.all()]
    assert found == [PROMPT.id, *map(str, range(450))]

    later = time.time() + 3600
    assert [label async for label in desk.labels.all(since=later)] == []


async def test_labels_of_a_later_release_are_counted_and_passed_over(desk: Desk) -> None:
    await desk.decide(PROMPT, "how to?")
    await add(desk, id="later", version=2)
    counts = ExportCounts()
    assert [example["id"] for example in await desk.export(counts)] == [PROMPT.id]
    assert counts == ExportCounts(examples=1, unreadable=1)


@pytest.mark.parametrize("data", ["", "[]", "7", "{}", '{"version": 2}', '{"version": 1}'])
def test_what_is_no_label(data: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Label.from_json(data)


async def test_the_oldest_labels_go_when_there_are_very_many(desk: Desk) -> None:
    reviews = Reviews(desk.kept.state, most_labels=100)
    for number in range(400):
        one = replace(PROMPT, id=f"{number:032x}")
        await reviews.add(one, "policy")
        await reviews.resolve(one.id, "ann", "confirmed", "severe")
    left = [label.id async for label in desk.labels.all()]
    assert 100 <= len(left) < 400
    assert left[-1] == f"{399:032x}"
