"""``sluicegate labels export``: into a file that keeps what it has, whole or not at all."""

import asyncio
import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from service.audit import Audit
from service.records import Record
from service.reviews import Reviews
from service.state import State
from sluicegate import app
from tests.service.event_rig import RECORD, Kept, kept, scores
from training.labelled import read_examples

FLAGGED = replace(RECORD, level="moderate", category_scores=scores("drugs"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A data directory, in which a private Valkey is started for each command."""
    made = tmp_path / "data"
    made.mkdir()
    return made


def export(place: Path, output: Path, *more: str) -> Result:
    arguments = ["labels", "export", "--output", str(output), "--data-directory", str(place)]
    return CliRunner().invoke(app, [*arguments, *more])


def refused(result: Result) -> str:
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line.removeprefix("sluicegate: ")


def told(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text("utf-8").splitlines()]


def decided(place: Path, *numbers: int, text: str | None = "how to?") -> None:
    """Records whose reviews are decided, and whose texts are kept if there are any."""

    async def decide(made: Kept, record: Record) -> None:
        await made.write(record)
        if text is not None:
            await made.texts.keep(record.id, text, "full")
        reviews = Reviews(made.state)
        await reviews.add(record, "policy")
        await reviews.resolve(record.id, "ann", "confirmed", "severe", ["drugs"])

    async def work() -> None:
        # As a service with its private Valkey does, for as long as it runs.
        state = await State.open(None, data_directory=place)
        try:
            url = f"unix://{place / 'valkey' / 'valkey.sock'}"
            async with kept(url, place) as made:
                for number in numbers:
                    await decide(made, replace(FLAGGED, id=f"{number:032x}"))
        finally:
            await state.close()

    asyncio.run(work())


def forget_texts(place: Path) -> None:
    """As their time does."""

    async def work() -> None:
        state = await State.open(None, data_directory=place)
        async with state.connected() as redis:
            names: Any = await redis.keys("sg1:{records}:text*")
            await redis.delete(*names)
        await state.close()

    asyncio.run(work())


def test_what_reviewers_said_is_what_training_reads(place: Path, tmp_path: Path) -> None:
    decided(place, 1, 2)
    output = tmp_path / "labels.jsonl"

    assert told(export(place, output)) == [f"{output}: 2 new examples, 2 in all"]

    first, second = read_examples(output)
    assert (first.id, first.prompt, first.severity) == (f"{1:032x}", "how to?", 3)
    assert second.pku_categories == ("drugs",)
    # It holds texts of users.
    assert stat.S_IMODE(output.stat().st_mode) == 0o600


def test_a_file_keeps_what_it_has_and_gets_what_is_new(place: Path, tmp_path: Path) -> None:
    decided(place, 1)
    output = tmp_path / "labels.jsonl"
    told(export(place, output))
    output.chmod(0o640)
    forget_texts(place)
    decided(place, 2)
    decided(place, 3, text=None)

    assert told(export(place, output)) == [
        f"{output}: 1 new examples, 2 in all",
        "1 labels are left out: no text is kept of them",
    ]
    assert [one["id"] for one in lines(output)] == [f"{1:032x}", f"{2:032x}"]
    assert stat.S_IMODE(output.stat().st_mode) == 0o640
    assert set(os.listdir(tmp_path)) == {"data", "labels.jsonl"}


def test_each_text_that_is_written_is_audited(place: Path, tmp_path: Path) -> None:
    decided(place, 1)
    told(export(place, tmp_path / "labels.jsonl"))
    told(export(place, tmp_path / "labels.jsonl"))

    async def looks() -> list[tuple[str, ...]]:
        state = await State.open(None, data_directory=place)
        acts, _ = await Audit(state).list()
        await state.close()
        return [act.record_ids for act in acts if act.action == "read_text"]

    assert asyncio.run(looks()) == [(f"{1:032x}",)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{}\n", "line 1: no labelled example"),
        ('{"id": "1"}\nx\n', "line 2: no labelled example"),
        ('{"id": "1"}', "ends within a line"),
    ],
)
def test_a_file_of_something_else_is_left_as_it_is(
    place: Path, tmp_path: Path, content: str, says: str
) -> None:
    output = tmp_path / "labels.jsonl"
    output.write_text(content)
    assert says in refused(export(place, output))
    assert output.read_text() == content


def test_where_nothing_can_be_written_one_line_says_so(place: Path, tmp_path: Path) -> None:
    assert "cannot be written" in refused(export(place, tmp_path / "gone" / "labels.jsonl"))
    assert "cannot be read" in refused(export(place, tmp_path))


def test_an_export_that_fails_changes_nothing(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "labels.jsonl"
    output.write_text('{"id": "1"}\n')
    # A server that cannot be reached: nothing listens there.
    result = export(place, output, "--state-url", f"unix://{tmp_path}/nobody.sock")
    assert "unavailable" in refused(result)
    assert output.read_text() == '{"id": "1"}\n'
    assert set(os.listdir(tmp_path)) == {"data", "labels.jsonl"}
