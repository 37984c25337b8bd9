"""What streams in: which pieces are judged, and that every character is in one of them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.inputs import Turn
from service.extractor import unescaped
from service.flow import OVERLAP_CHARACTERS, Flow

CONTEXT = (Turn("user", "q"),)


def spoken(flow: Flow, text: str, track: str = "text", size: int = 5) -> list[int]:
    """Says ``text`` in small parts, with everything judged at once as harmless; the ends."""
    ends = []
    for start in range(0, len(text), size):
        flow.add("text", track, text[start : start + size])
        end = flow.due()
        if end is not None:
            ends.append(end)
            flow.judged(end, 0.0)
    return ends


def test_pieces_end_where_sentences_do_and_grow_while_nothing_is_found() -> None:
    text = "This is a sentence of fifty characters, no more. " * 60
    ends = spoken(Flow(CONTEXT), text)
    assert all(text[:end].endswith(".") for end in ends)
    steps = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    assert steps[0] < 100
    assert steps[:3] == sorted(steps[:3])
    assert 300 < steps[-1] <= 700


def test_text_without_sentences_is_judged_too() -> None:
    ends = spoken(Flow(CONTEXT), "word " * 400)
    assert ends[0] <= 150
    assert all(end - start <= 1100 for start, end in zip([0, *ends], ends, strict=False))


def test_pieces_are_small_once_anything_is_found() -> None:
    flow = Flow(CONTEXT)
    spoken(flow, "A sentence of some forty characters here. " * 40)
    flow.judged(flow.position, 0.3)
    at = flow.position
    (first, *_) = spoken(flow, "A sentence of some forty characters here. " * 40)
    assert first - at < 200


def test_load_makes_them_larger() -> None:
    calm, busy = Flow(CONTEXT), Flow(CONTEXT)
    for flow in (calm, busy):
        flow.add("text", "text", "A sentence of some forty characters here. ")
    assert calm.due() is not None
    assert busy.due(load=4.0) is None


def test_each_track_is_judged_in_its_own_field_and_only_where_it_grew() -> None:
    flow = Flow(CONTEXT)
    flow.add("reasoning", "reasoning", "let me think. ")
    flow.add("text", "content", "well then. ")
    assert [(f.name, f.judged.text) for f in flow.fields(flow.position)] == [
        ("reasoning", "let me think. "),
        ("text", "well then. "),
    ]
    flow.judged(flow.position, 0.0)
    flow.add("text", "content", "more. ")
    (one,) = flow.fields(flow.position)
    assert (one.path, one.judged.text) == ("content", "well then. more. ")
    assert one.judged.context == CONTEXT


def test_a_tool_call_in_pieces_is_read_without_its_escapes() -> None:
    flow = Flow(CONTEXT)
    flow.add("tool_call", "call", '{"what": "\\u0062om')
    flow.add("tool_call", "call", 'b"')
    (one,) = flow.fields(flow.position)
    assert "bomb" in one.judged.text


@given(st.text(st.characters(codec="utf-8")))
def test_escapes_are_taken_for_what_they_mean(text: str) -> None:
    assert unescaped(json.dumps(text)[1:-1]) == text


@pytest.mark.parametrize(("raw", "text"), [("a\\", "a\\"), ("\\u00", "u00"), ("\\ud83d", "�")])
def test_half_an_escape_is_read_as_far_as_it_goes(raw: str, text: str) -> None:
    assert unescaped(raw) == text


PARTS = st.lists(
    st.tuples(st.sampled_from(["a", "b"]), st.text("xyz .!\n", min_size=1, max_size=40)),
    min_size=1,
    max_size=60,
)


@settings(max_examples=100, deadline=None)
@given(PARTS, st.data())
def test_every_character_is_judged_with_what_came_before_it(
    parts: list[tuple[str, str]], data: st.DataObject
) -> None:
    flow = Flow(CONTEXT)
    texts = {"a": "", "b": ""}
    judged = {"a": 0, "b": 0}

    def judge(end: int) -> None:
        for piece in flow.fields(end):
            text = piece.judged.text
            whole = texts[piece.path]
            # It stands somewhere in the track, and leaves no gap behind what was judged.
            places = [i for i in range(len(whole)) if whole.startswith(text, i)]
            fitting = [i for i in places if i <= max(judged[piece.path] - OVERLAP_CHARACTERS, 0)]
            assert fitting
            judged[piece.path] = max(judged[piece.path], max(fitting) + len(text))
        flow.judged(end, data.draw(st.sampled_from([0.0, 0.5])))

    for track, text in parts:
        flow.add("text", track, text)
        texts[track] += text
        end = flow.due()
        if end is not None:
            judge(end)
    judge(flow.position)
    for track, text in texts.items():
        assert text[judged[track] :].strip() == ""
