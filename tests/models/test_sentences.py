"""Where sentences end: a table of texts, cut at the bars."""

import pytest

from models.sentences import sentence_ends


@pytest.mark.parametrize(
    "cut",
    [
        "",
        "no mark at all",
        "One. |Two! |Three?! |Four... |five",
        "One.  |Two. ",
        "“Is it?” |She said (no.) |He left.",
        "Dr. Hu met J. R. Moss, e.g. in St. Ives. |They left.",
        "It is 3.14, or v1.2.3, see a.b.com. |Yes.",
        "So do I. |Right.",
        "No. |Never.",
        "Steps:\n|1. Mix it.\n|2. Bake it\n\n|a) Eat",
        "- one\n|- two\n",
        "你好。|再见！|好",
        "  \n ",
        "\n\nAfter blanks. |b",
    ],
)
def test_sentences_end_at_the_bars(cut: str) -> None:
    pieces = cut.split("|")
    ends = sentence_ends("".join(pieces))
    lengths = [len(piece) for piece in pieces if piece]
    assert ends == tuple(sum(lengths[: n + 1]) for n in range(len(lengths)))


@pytest.mark.parametrize("text", ["Mr. " * 20_000, "\n" * 80_000, "a.b" * 30_000, ". " * 40_000])
def test_a_text_made_to_be_slow_is_not(text: str) -> None:
    ends = sentence_ends(text)
    assert ends[-1] == len(text)
    assert list(ends) == sorted(set(ends))
