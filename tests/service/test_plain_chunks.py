"""Chunks like the one before need no parser: whatever comes, the same is heard as with one."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from service import sse
from service.chat import ChatDialect
from service.chunk_reader import ChunkReader
from service.errors import SluicegateError

CHAT = ChatDialect()
HEADS: tuple[dict[str, Any], ...] = (
    {"id": "x", "model": "m"},
    {"id": "two words"},
    {"extra": "said"},
    {"usage": None},
)
DELTAS: tuple[dict[str, Any], ...] = (
    {}, {"refusal": None}, {"role": "assistant"}, {"refusal": "No."}, {"reasoning": "why"},
)  # fmt: skip
ITEMS: tuple[dict[str, Any], ...] = (
    {},
    {"finish_reason": None},
    {"logprobs": None},
    {"note": "n"},
    {"finish_reason": "stop"},
)
TEXTS = ("a", " b", '"content":"a"', "a\\", "\n", "é", "\u2028", "", "a?")


@st.composite
def events(draw: st.DrawFn) -> list[str]:
    found: list[str] = []
    for _ in range(draw(st.integers(1, 8))):
        head, delta, item = draw(
            st.tuples(st.sampled_from(HEADS), st.sampled_from(DELTAS), st.sampled_from(ITEMS))
        )
        separators = draw(st.sampled_from([(",", ":"), (", ", ": ")]))
        for text in draw(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=5)):
            choice = {"index": 0, "delta": {"content": text} | delta} | item
            chunk: dict[str, Any] = (
                {"object": "chat.completion.chunk"} | head | {"choices": [choice]}
            )
            ascii_only = draw(st.booleans())
            found.append(json.dumps(chunk, ensure_ascii=ascii_only, separators=separators))
    return [*found, "[DONE]"]


def heard(data: list[str], *, is_quick: bool) -> list[Any]:
    body = {"model": "m", "messages": [{"role": "user", "content": "q"}], "stream": True}
    reader = CHAT.reader(CHAT.parse(body))
    assert isinstance(reader, ChunkReader)
    if not is_quick:
        reader._misses = 1 << 30
    found: list[Any] = []
    try:
        for one in data:
            found.append(reader.hear(sse.Event(None, one, sse.encode(one))))
        found.append(reader.answer())
    except SluicegateError as error:
        found.append((type(error), str(error)))
    return found


@settings(max_examples=300, deadline=None)
@given(events())
def test_the_same_is_heard_with_and_without_a_parser(data: list[str]) -> None:
    assert heard(data, is_quick=True) == heard(data, is_quick=False)


def test_a_run_of_plain_chunks_is_not_parsed(monkeypatch: Any) -> None:
    chunk = '{"choices":[{"index":0,"delta":{"content":"%s"}}]}'
    body = {"model": "m", "messages": [{"role": "user", "content": "q"}], "stream": True}
    reader = CHAT.reader(CHAT.parse(body))
    reader.hear(sse.Event(None, chunk % "a", b""))
    monkeypatch.setattr("service.chunk_reader.parsed", None)
    (said,) = reader.hear(sse.Event(None, chunk % " b", b"")).said
    assert said.text == " b"
