"""Repeated texts are recognised whole, in part and by their hashes alone."""

import gzip
import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.labelled import LabelError
from training.overlap import OverlapIndex, fingerprint, read_hashes

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
TEXT = " ".join(WORDS)


def index_of(*texts: str, most_holders: int | None = None) -> OverlapIndex:
    index = OverlapIndex(most_holders)
    for text in texts:
        index.add(fingerprint(text))
    return index


@pytest.mark.parametrize(
    "text",
    ["One, two, three!", "Human: one two three", "one  two\nthree", "Assistant: one two three"],
)
def test_case_marks_speakers_and_layout_do_not_count(text: str) -> None:
    assert fingerprint(text) == fingerprint("one two three")


def test_hashes_are_those_that_kept_back_texts_are_published_by() -> None:
    found = fingerprint(TEXT)
    assert found.whole == int(
        hashlib.sha1(TEXT.encode(), usedforsecurity=False).hexdigest()[:10], 16
    )
    first = " ".join(WORDS[:5])
    assert (
        int(hashlib.sha1(first.encode(), usedforsecurity=False).hexdigest()[:10], 16) in found.grams
    )
    assert len(found.grams) == 6


def _sha1(text: str) -> int:
    return int(hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:10], 16)


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        (TEXT, True),
        ("two words", False),
        # Six of its seven 5-grams, and all of the indexed text's.
        (TEXT + " eleven", True),
        # It holds the whole text, among much else.
        ("a b c d e f g h i j k l m n " + TEXT, True),
        # Half of it.
        (" ".join(WORDS[:7]) + " and then it goes on about other things", False),
        # Shorter than a 5-gram, so only the whole counts.
        ("one two three", False),
    ],
)
def test_a_text_repeats_one_that_it_is_made_of_or_holds(text: str, repeats: bool) -> None:
    assert index_of(TEXT, "something else").repeats(fingerprint(text)) is repeats


def test_short_texts_repeat_as_a_whole() -> None:
    assert index_of("Hello there").repeats(fingerprint("hello, there"))


def test_the_nearest_comes_first() -> None:
    index = index_of(" ".join(WORDS[:7]), TEXT)
    assert [match.number for match in index.matches(fingerprint(TEXT))] == [1, 0]


def test_a_gram_counts_for_so_many_texts_only() -> None:
    index = index_of(*(f"{TEXT} number{n}" for n in range(9)), most_holders=3)
    assert len(index.matches(fingerprint(TEXT + " other"))) == 3


def test_a_file_of_hashes_holds_one_text_a_line(tmp_path: Path) -> None:
    item = fingerprint(TEXT)
    line = " ".join(f"{number:010x}" for number in (item.whole, *sorted(item.grams)))
    with gzip.open(tmp_path / "h.gz", "wt") as file:
        file.write(f"{line}\n00000000aa\n")
    first, second = read_hashes(tmp_path / "h.gz")
    assert first == item
    assert second.whole == 0xAA


@pytest.mark.parametrize("content", [b"not gzip", gzip.compress(b"xyz\n")])
def test_what_is_not_a_file_of_hashes_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "h.gz").write_bytes(content)
    with pytest.raises(LabelError, match=r"h\.gz is not a gzip file of hashes"):
        read_hashes(tmp_path / "h.gz")


@given(st.text(max_size=80))
def test_every_text_repeats_itself(text: str) -> None:
    assert index_of(text).repeats(fingerprint(text))
