"""Labelled files: what is read, and what each fault is called."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from models.inputs import Turn
from training.labelled import LabelError, read_examples

PROMPT: dict[str, Any] = {"id": "1", "source": "s", "role": "prompt", "prompt": "p"}
RESPONSE: dict[str, Any] = PROMPT | {"role": "response", "response": "r"}


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_a_response_is_judged_behind_its_prompt_and_the_turns_before(tmp_path: Path) -> None:
    row = RESPONSE | {"turns": [{"speaker": "user", "text": "t"}], "near": "drugs"}
    (example,) = read_examples(written(tmp_path / "f.jsonl", row))
    item = example.guard_input()
    assert (item.role, item.text) == ("response", "r")
    assert item.context == (Turn("user", "t"), Turn("user", "p"))


def test_a_prompt_stands_alone(tmp_path: Path) -> None:
    (example,) = read_examples(written(tmp_path / "f.jsonl", PROMPT))
    assert example.guard_input().context == ()
    assert example.unsafe is None


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (PROMPT | {"colour": "red"}, "key 'colour' is unknown"),
        (PROMPT | {"role": "poet"}, "key role"),
        ({"id": "1", "source": "s", "role": "prompt"}, "key prompt"),
        (PROMPT | {"role": "response"}, "there is no response"),
        (PROMPT | {"severity": 4}, "key severity"),
        (PROMPT | {"severity": 2, "unsafe": False}, "unsafe is False, but severity is 2"),
        (PROMPT | {"severity": 0, "unsafe": True}, "unsafe is True, but severity is 0"),
        (PROMPT | {"pku_categories": ["theft"]}, "'theft' is not one of the 19"),
        (PROMPT | {"unsafe": False, "pku_categories": ["drugs"]}, "pku_categories is not empty"),
        (PROMPT | {"unsafe": True, "first_harmful_end": 3}, "the row is no harmful response"),
        (
            RESPONSE | {"unsafe": True, "severity": 1, "first_harmful_end": 900},
            "first_harmful_end lies beyond the response",
        ),
    ],
)
def test_a_faulty_row_is_named_by_its_line(tmp_path: Path, row: dict[str, Any], fault: str) -> None:
    path = written(tmp_path / "f.jsonl", PROMPT, row)
    with pytest.raises(LabelError, match=r"f\.jsonl, line 2") as caught:
        list(read_examples(path))
    assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("content", "fault"),
    [(b"{", "line 1: not JSON"), (b"[]", "line 1: not a JSON object"), (b"\xff", "not UTF-8")],
)
def test_a_file_that_is_no_json_lines(tmp_path: Path, content: bytes, fault: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(content)
    with pytest.raises(LabelError, match=fault):
        list(read_examples(path))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="cannot be read"):
        list(read_examples(tmp_path / "none.jsonl"))


def test_a_file_may_be_compressed(tmp_path: Path) -> None:
    plain = written(tmp_path / "f.jsonl", PROMPT, RESPONSE)
    zipped = tmp_path / "f.jsonl.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    assert list(read_examples(zipped)) == list(read_examples(plain))


@pytest.mark.parametrize("content", [b"{}", gzip.compress(b"\n" * 9999)[:-9]])
def test_a_compressed_file_that_is_broken(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "f.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(LabelError, match=r"f\.jsonl\.gz cannot be read"):
        list(read_examples(path))
