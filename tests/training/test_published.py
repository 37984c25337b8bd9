"""Published schemas: what becomes an example, what is dropped, and what each fault is called."""

import gzip
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from models.inputs import Turn
from models.taxonomy import BEAVERTAILS, CATEGORIES, PKU_SAFERLHF
from training.labelled import Example, LabelError
from training.published import (
    Dropped,
    Schema,
    beavertails,
    beavertails_v,
    pku_saferlhf,
    read_published,
)


def flags(known: Any, *true: str) -> dict[str, bool]:
    return {name: name in true for name in known}


PKU: dict[str, Any] = {
    "prompt": "question",
    "response_0": "bad answer",
    "response_1": "good answer",
    "prompt_source": "Alpaca3-70B",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "response_0_harm_category": flags(PKU_SAFERLHF, "White-Collar Crime", "Economic Crime"),
    "response_1_harm_category": flags(PKU_SAFERLHF),
    "response_0_severity_level": 2,
    "response_1_severity_level": 0,
    "better_response_id": 1,
    "safer_response_id": 1,
}
READ_OF_PKU = sorted(PKU.keys() - {"prompt_source", "better_response_id", "safer_response_id"})
BEAVER: dict[str, Any] = {
    "prompt": "question",
    "response": "answer",
    "category": flags(BEAVERTAILS, "animal_abuse", "violence,aiding_and_abetting,incitement"),
    "is_safe": False,
}
BEAVER_V: dict[str, Any] = {
    "question": "question",
    "category": "animal_abuse",
    "response_1": "bad answer",
    "response_2": "good answer",
    "is_response_1_safe": "no",
    "is_response_2_safe": "yes",
    "response_1_harmless_rate": -2,
    "response_2_harmless_rate": 0,
}


def example(one: Example | Dropped) -> Example:
    assert isinstance(one, Example)
    return one


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_pku_gives_both_answers_with_severity_and_categories() -> None:
    bad, good = map(example, pku_saferlhf(PKU))
    assert (bad.role, bad.prompt, bad.response) == ("response", "question", "bad answer")
    assert (bad.unsafe, bad.severity) == (True, 2)
    assert bad.categories == ("Economic Crime", "White-Collar Crime")
    assert bad.pku_categories == ("economic_crime", "white_collar_crime")
    assert bad.guard_input().context == (Turn("user", "question"),)
    assert (good.unsafe, good.severity, good.pku_categories) == (False, 0, ())
    assert bad.source == good.source == "pku_saferlhf"
    assert bad.id != good.id


@pytest.mark.parametrize("name", PKU_SAFERLHF)
def test_each_published_name_is_one_of_our_categories(name: str) -> None:
    row = PKU | {"response_0_harm_category": flags(PKU_SAFERLHF, name)}
    bad, _ = map(example, pku_saferlhf(row))
    assert bad.pku_categories == (name.lower().replace(" ", "_").replace("-", "_"),)
    assert set(bad.pku_categories) <= set(CATEGORIES)


def test_beavertails_has_harm_and_categories_and_no_severity() -> None:
    (bad,) = map(example, beavertails(BEAVER))
    assert (bad.unsafe, bad.severity) == (True, None)
    assert bad.categories == ("animal_abuse", "violence,aiding_and_abetting,incitement")
    assert bad.pku_categories == ("animal_abuse", "violence")


def test_a_beavertails_category_without_counterpart_leaves_ours_unknown() -> None:
    row = BEAVER | {"category": flags(BEAVERTAILS, "animal_abuse", "controversial_topics,politics")}
    (bad,) = map(example, beavertails(row))
    assert bad.categories == ("animal_abuse", "controversial_topics,politics")
    assert bad.pku_categories is None


def test_a_safe_beavertails_answer_is_of_no_category() -> None:
    (good,) = map(example, beavertails(BEAVER | {"is_safe": True, "category": flags(BEAVERTAILS)}))
    assert (good.unsafe, good.categories, good.pku_categories) == (False, (), ())


def test_the_text_of_beavertails_v_has_harm_and_the_categories_of_safe_answers_alone() -> None:
    bad, good = map(example, beavertails_v(BEAVER_V))
    assert (bad.prompt, bad.response, bad.unsafe) == ("question", "bad answer", True)
    assert (bad.severity, bad.categories, bad.pku_categories) == (None, ("animal_abuse",), None)
    assert (good.unsafe, good.categories, good.pku_categories) == (False, (), ())


@pytest.mark.parametrize(
    ("reader", "row", "reason"),
    [
        (pku_saferlhf, PKU | {"is_response_0_safe": True}, "safe, but of some severity"),
        (pku_saferlhf, PKU | {"response_0_severity_level": 0}, "unsafe, but of no severity"),
        (
            pku_saferlhf,
            PKU | {"is_response_0_safe": True, "response_0_severity_level": 0},
            "safe, but of a category",
        ),
        (
            pku_saferlhf,
            PKU | {"response_0_harm_category": flags(PKU_SAFERLHF)},
            "unsafe, but of no category",
        ),
        (pku_saferlhf, PKU | {"response_0": " \n"}, "empty"),
        (beavertails, BEAVER | {"is_safe": True}, "safe, but of a category"),
        (beavertails, BEAVER | {"category": flags(BEAVERTAILS)}, "unsafe, but of no category"),
        (beavertails, BEAVER | {"prompt": ""}, "empty"),
        (beavertails_v, BEAVER_V | {"is_response_1_safe": "yes"}, "safe, but rated harmful"),
        (beavertails_v, BEAVER_V | {"response_1_harmless_rate": 0}, "unsafe, but rated harmless"),
        (beavertails_v, BEAVER_V | {"response_1": ""}, "empty"),
    ],
)
def test_an_answer_that_contradicts_itself_or_is_empty_is_dropped(
    reader: Any, row: dict[str, Any], reason: str
) -> None:
    first, *others = reader(row)
    assert first == Dropped(reason)
    assert all(isinstance(other, Example) for other in others)


@pytest.mark.parametrize(("reader", "row"), [(pku_saferlhf, PKU), (beavertails, BEAVER)])
def test_an_answer_has_the_same_id_wherever_it_stands(reader: Any, row: dict[str, Any]) -> None:
    assert list(reader(row)) == list(reader(deepcopy(row) | {"prompt_source": "other"}))


def without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


@pytest.mark.parametrize(
    ("schema", "row", "fault"),
    [
        *(("pku_saferlhf", without(PKU, name), f"{name} is missing") for name in READ_OF_PKU),
        *(("beavertails", without(BEAVER, name), f"{name} is missing") for name in BEAVER),
        *(("beavertails_v", without(BEAVER_V, name), f"{name} is missing") for name in BEAVER_V),
        ("pku_saferlhf", PKU | {"prompt": None}, "prompt is NoneType, not str"),
        ("pku_saferlhf", PKU | {"is_response_1_safe": 1}, "is_response_1_safe is int, not bool"),
        (
            "pku_saferlhf",
            PKU | {"response_1_severity_level": False},
            "response_1_severity_level is bool, not int",
        ),
        ("pku_saferlhf", PKU | {"response_0_severity_level": 4}, "is 4, not 0 to 3"),
        (
            "pku_saferlhf",
            PKU | {"response_1_harm_category": flags(tuple(PKU_SAFERLHF)[1:])},
            "response_1_harm_category: Endangering National Security is missing",
        ),
        (
            "pku_saferlhf",
            PKU | {"response_0_harm_category": flags((*PKU_SAFERLHF, "Arson"))},
            "response_0_harm_category: 'Arson' is not one of the 19",
        ),
        (
            "beavertails",
            BEAVER | {"category": flags(BEAVERTAILS) | {"self_harm": "no"}},
            "category: self_harm is str, not bool",
        ),
        ("beavertails_v", BEAVER_V | {"category": "arson"}, "category is 'arson'"),
        ("beavertails_v", BEAVER_V | {"is_response_2_safe": "maybe"}, "'maybe', not 'yes' or 'no'"),
    ],
)
def test_a_faulty_field_is_named_with_its_line(
    schema: Schema, row: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    sound = {"pku_saferlhf": PKU, "beavertails": BEAVER, "beavertails_v": BEAVER_V}[schema]
    path = written(tmp_path / "f.jsonl", sound, row)
    with pytest.raises(LabelError, match=r"f\.jsonl, line 2") as caught:
        list(read_published(path, schema))
    assert fault in str(caught.value)


def test_reads_json_lines_gzip_and_parquet_alike(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra 'train'")
    from pyarrow import parquet

    plain = written(tmp_path / "f.jsonl", PKU, PKU | {"prompt": "other"})
    zipped = tmp_path / "f.jsonl.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    table = pyarrow.Table.from_pylist([PKU, PKU | {"prompt": "other"}])
    parquet.write_table(table, tmp_path / "f.parquet")

    expected = list(read_published(plain, "pku_saferlhf"))

    assert len(expected) == 4
    assert list(read_published(zipped, "pku_saferlhf")) == expected
    assert list(read_published(tmp_path / "f.parquet", "pku_saferlhf")) == expected


def test_a_parquet_file_is_read_without_its_images(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra 'train'")
    from pyarrow import parquet

    row = BEAVER_V | {"image": {"bytes": b"png", "path": None}}
    for name, rows in (("f", [row]), ("faulty", [without(row, "response_2")])):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")

    assert len(list(read_published(tmp_path / "f.parquet", "beavertails_v"))) == 2
    with pytest.raises(LabelError, match=r"faulty\.parquet, row 1: response_2 is missing"):
        list(read_published(tmp_path / "faulty.parquet", "beavertails_v"))


@pytest.mark.parametrize("content", [None, b"no parquet"])
def test_a_parquet_file_that_cannot_be_read(content: bytes | None, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs the extra 'train'")
    path = tmp_path / "f.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LabelError, match=r"f\.parquet cannot be read"):
        list(read_published(path, "beavertails"))
