"""Texts of records: as the policy says, for a while, looked at on the record, deletable."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service import kept_texts
from service.errors import BadRequest, StateUnavailable
from service.events import Filters
from service.kept_texts import TEXTS, KeptText, hashed_subject, subject_of, text_key
from service.records import ENTRIES, STREAM, Record
from tests.service.event_rig import RECORD, Kept, kept, some_records

KEY = b"k" * 32
ANN = hashed_subject("ann", KEY)


async def text_keys(rig: Kept) -> set[str]:
    return await rig.keys("sg1:{records}:text:*")


@pytest.mark.parametrize(
    "body",
    [
        {"user": "ann"},
        {"safety_identifier": "ann", "user": "another"},
        {"metadata": {"user_id": "ann"}},
    ],
)
def test_a_subject_is_whom_the_client_names_hashed(body: dict[str, object]) -> None:
    assert subject_of(body, KEY) == ANN
    assert subject_of(body, b"another") != ANN
    assert "ann" not in ANN


@pytest.mark.parametrize(
    "body", [{}, {"user": ""}, {"user": 3}, {"metadata": "x"}, {"metadata": {"user_id": None}}]
)
def test_nobody_named_is_no_subject(body: dict[str, object]) -> None:
    assert subject_of(body, KEY) is None


async def test_a_text_is_kept_in_full_or_redacted(url: str, tmp_path: Path) -> None:
    async with kept(url, tmp_path) as rig:
        assert await rig.texts.keep("1", "mail ann@example.org", "full")
        assert await rig.texts.keep("2", "mail ann@example.org", "redacted")

        assert await rig.texts.look("1", None) == KeptText("mail ann@example.org", "full", False)
        assert await rig.texts.look("2", None) == KeptText("mail [email]", "redacted", False)
        assert await rig.texts.look("3", None) is None


async def test_half_an_address_does_not_stay_at_the_end_of_a_cut_text(
    url: str, tmp_path: Path
) -> None:
    address = "ann.lee@mail.example.org"
    async with kept(url, tmp_path, texts={"most_characters": 1000}) as rig:
        for place in (1000 - 12, 2000 - 12):
            await rig.texts.keep("1", "word " * 600, "redacted")
            text = ("word " * 600)[:place] + " " + address + " word" * 600
            await rig.texts.keep("2", text, "redacted")

            shown = await rig.texts.look("2", None)
            assert shown is not None
            assert shown.is_cut
            assert len(shown.text) <= 1000
            assert "ann" not in shown.text


async def test_a_text_that_normalising_makes_longer_costs_no_more(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []

    def noted(text: str) -> str:
        lengths.append(len(text))
        return text

    monkeypatch.setattr(kept_texts, "redacted", noted)
    async with kept(url, tmp_path, texts={"most_characters": 1000}) as rig:
        # One character that NFKC writes in 18.
        await rig.texts.keep("1", "\ufdfa" * 1900, "redacted")

        shown = await rig.texts.look("1", None)
        assert shown is not None
        assert (len(shown.text), shown.is_cut) == (1000, True)
        assert lengths == [2000]


@pytest.mark.parametrize("data", ["", "[", "[]", "7", '{"later": 1}'])
async def test_a_text_kept_in_another_way_is_passed_over(
    url: str, tmp_path: Path, data: str
) -> None:
    async with kept(url, tmp_path) as rig:
        async with rig.state.connected() as redis:
            await redis.set(text_key("1"), data)

        assert await rig.texts.look("1", None) is None


async def test_texts_expire_apart_from_their_records(url: str, tmp_path: Path) -> None:
    async with kept(url, tmp_path, texts={"seconds": 1}) as rig:
        await rig.write(replace(RECORD, subject=ANN))
        await rig.texts.keep(RECORD.id, "text", "full", ANN)
        await asyncio.sleep(1.1)

        assert await rig.texts.look(RECORD.id, None) is None
        assert await rig.ids() == [RECORD.id]
        async with rig.state.connected() as redis:
            assert not await redis.exists(f"{TEXTS}:{ANN}")


async def test_only_so_many_texts_are_kept(url: str, tmp_path: Path) -> None:
    async with kept(url, tmp_path, texts={"most": 3}) as rig:
        for number in range(8):
            await rig.texts.keep(str(number), "text", "full")
            await asyncio.sleep(0.002)

        assert await text_keys(rig) == {text_key(str(number)) for number in (5, 6, 7)}


async def test_only_so_many_subjects_are_kept(url: str, tmp_path: Path) -> None:
    async with kept(url, tmp_path, texts={"most": 3}) as rig:
        for number in range(8):
            await rig.texts.keep(str(number), "text", "full", f"{number:032x}")
            await asyncio.sleep(0.002)

        assert await rig.keys(f"{TEXTS}:*") == {f"{TEXTS}:{number:032x}" for number in (5, 6, 7)}


async def test_a_text_that_cannot_be_kept_is_counted_and_holds_nobody_up(
    url: str, tmp_path: Path
) -> None:
    async with kept(url, tmp_path) as rig:
        await rig.state.close()

        assert not await rig.texts.keep("1", "text", "full")
        assert (rig.texts.counts.kept, rig.texts.counts.missed) == (0, 1)


async def test_every_look_is_recorded_also_one_that_finds_nothing(url: str, tmp_path: Path) -> None:
    async with kept(url, tmp_path) as rig:
        await rig.texts.keep("1", "text", "full")
        await rig.texts.look("1", "key-a")
        await rig.texts.look("2", None)

        acts, following = await rig.audit.list()
        assert [(act.key_id, act.action, act.record_ids) for act in acts] == [
            (None, "read_text", ("2",)),
            ("key-a", "read_text", ("1",)),
        ]
        assert following is None


async def test_a_look_that_cannot_be_recorded_shows_nothing(url: str, tmp_path: Path) -> None:
    async with kept(url, tmp_path) as rig:
        await rig.texts.keep("1", "text", "full")
        async with rig.state.connected() as redis:
            # It cannot be added to, but the text can be read.
            await redis.set("sg1:{audit}:stream", "no stream")

        with pytest.raises(StateUnavailable):
            await rig.texts.look("1", "key-a")


async def test_the_audit_has_pages(url: str, tmp_path: Path) -> None:
    async with kept(url, tmp_path) as rig:
        for number in range(7):
            await rig.audit.add(None, "read_text", [str(number)])

        found: list[str] = []
        cursor: str | None = None
        while True:
            acts, cursor = await rig.audit.list(3, cursor)
            found += [act.record_ids[0] for act in acts]
            if cursor is None:
                break
        assert found == ["6", "5", "4", "3", "2", "1", "0"]
        for bad in ("a1.x", "a1.99999999999999999999-0"):
            with pytest.raises(BadRequest, match="none of ours"):
                await rig.audit.list(3, bad)


def of_ann_and_others() -> tuple[list[Record], list[Record]]:
    records = some_records(40)
    anns = [replace(record, subject=ANN) for record in records[::4]]
    return anns, [record for record in records if record.id not in {one.id for one in anns}]


async def test_a_subject_is_deleted_with_texts_and_records_indexed_or_not(
    url: str, tmp_path: Path
) -> None:
    anns, others = of_ann_and_others()
    async with kept(url, tmp_path) as rig:
        await rig.write(*anns[:5], *others)
        await rig.recorder.write(anns[5:])
        for record in (*anns, others[0]):
            await rig.texts.keep(record.id, "text", "full", record.subject)
        # The record of this one was trimmed before its text.
        await rig.texts.keep("trimmed", "text", "full", ANN)

        deleted = await rig.texts.delete_subject(ANN, "key-a")

        assert sorted(deleted) == sorted([record.id for record in anns] + ["trimmed"])
        assert await text_keys(rig) == {text_key(others[0].id)}
        async with rig.state.connected() as redis:
            left: Any = await redis.hkeys(ENTRIES)
            assert {identity.decode() for identity in left} == {record.id for record in others}
            assert await redis.xlen(STREAM) == len(others)
        await rig.index.catch_up()
        for direction in ("prompt", "response"):
            assert set(await rig.ids(Filters(direction=direction))) == {
                record.id for record in others if record.direction == direction
            }


async def test_a_deletion_is_recorded_before_and_after(url: str, tmp_path: Path) -> None:
    async with kept(url, tmp_path) as rig:
        await rig.write(replace(RECORD, subject=ANN))
        await rig.texts.delete_subject(ANN, "key-a")

        acts, _ = await rig.audit.list()
        assert [(act.action, act.record_ids) for act in acts] == [
            ("deleted", (RECORD.id,)),
            ("delete_subject", ()),
        ]


async def test_what_was_deleted_is_recorded_though_the_rest_fails(url: str, tmp_path: Path) -> None:
    async with kept(url, tmp_path) as rig:
        await rig.texts.keep("1", "text", "full", ANN)
        async with rig.state.connected() as redis:
            # Records cannot be looked through.
            await redis.set(STREAM, "no stream")

        with pytest.raises(StateUnavailable):
            await rig.texts.delete_subject(ANN, "key-a")

        acts, _ = await rig.audit.list(1)
        assert [(act.action, act.record_ids) for act in acts] == [("deleted", ("1",))]
        assert await text_keys(rig) == set()


async def test_one_record_is_deleted_with_its_text(url: str, tmp_path: Path) -> None:
    async with kept(url, tmp_path) as rig:
        await rig.write(RECORD, replace(RECORD, id="2"))
        await rig.texts.keep(RECORD.id, "text", "full")

        assert await rig.texts.delete(RECORD.id, "unknown") == [RECORD.id]
        assert await rig.ids(Filters(direction="prompt")) == ["2"]
        assert await text_keys(rig) == set()
