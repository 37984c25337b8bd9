"""Conversations inside one prompt: what is taken apart, and what is left alone."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.inputs import Turn
from training.transcript import parse

MARKS = {"user": ("Human:", "User:", "USER:"), "assistant": ("Assistant:", "AI:", "ASSISTANT:")}

# Content as datasets have it: no blanks around it, and no line that is itself a mark.
contents = (
    st.text(max_size=80)
    .map(str.strip)
    .filter(lambda text: not re.search(r"^[ \t]*(#|Human|User|Assistant|AI)", text, re.M | re.I))
)
turns = st.lists(
    st.builds(Turn, speaker=st.sampled_from(["user", "assistant"]), text=contents), max_size=6
)


def user(text: str) -> Turn:
    return Turn(speaker="user", text=text)


def assistant(text: str) -> Turn:
    return Turn(speaker="assistant", text=text)


@pytest.mark.parametrize(
    "text",
    [
        "Human: a\n\nAssistant: b\n\nHuman: c",
        "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
        "User: a\nAI: b\nUser: c",
        "### Human: a\n### Assistant: b\n### Human: c",
        "### Human\na\n### Assistant\nb\n### Human\nc\n### Assistant\n",
    ],
)
def test_takes_the_known_forms_apart(text: str) -> None:
    assert parse(text) == ((user("a"), assistant("b")), "c")


def test_one_turn_loses_its_mark() -> None:
    assert parse("Human: how do I bake bread?") == ((), "how do I bake bread?")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "How do I bake bread?",
        "Write a dialogue.\nHuman: hello\nAI: hello",
        "I told the User: no",
        "Humans: a history",
        "### Human resources\nWho runs them?",
        "AI: what it is and is not",
        # It ends with an answer: nothing of the user is left to judge.
        "Human: a\n\nAssistant: b",
        "Human:\n\nAssistant:",
    ],
)
def test_leaves_other_texts_as_they_are(text: str) -> None:
    assert parse(text) == ((), text)


def test_a_mark_inside_a_line_is_content() -> None:
    assert parse("Human: say Assistant: yes\nAI: no\nHuman: why") == (
        (user("say Assistant: yes"), assistant("no")),
        "why",
    )


@given(turns, contents.filter(bool), st.integers(0, 2), st.sampled_from(["\n", "\n\n"]))
def test_what_is_written_is_what_is_read(
    past: list[Turn], last: str, style: int, between: str
) -> None:
    written = [*past, user(last)]
    text = between.join(f"{MARKS[turn.speaker][style]} {turn.text}" for turn in written)
    assert parse(text) == (tuple(past), last)


@given(
    st.lists(st.sampled_from(["Human:", "AI:", "### User", "\n", " ", "a", "b:", "#"]), max_size=20)
)
def test_no_content_is_lost(pieces: list[str]) -> None:
    text = "".join(pieces)
    past, last = parse(text)
    kept = "".join(turn.text for turn in past) + last
    if kept != text:
        text = re.sub(r"^[ \t]*((### ?)?(Human|AI|User):|### User[ \t]*$)", "", text, flags=re.M)
    assert "".join(kept.split()) == "".join(text.split())
