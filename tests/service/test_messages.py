"""The Messages dialect: what is scanned of a request and an answer, and how it is rendered."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import errors
from service.errors import BadRequest, SluicegateError, UpstreamMalformed
from service.exchange import Answer, Exchange, Field, ModerationRequest, Refusal, Retry
from service.messages import MessagesDialect

MESSAGES = MessagesDialect()
REFUSAL = Refusal("No.", "stop")
RETRY = Retry(seed=5, instruction="I", choices=(0,))


def parsed(*messages: dict[str, Any], **more: Any) -> Exchange:
    return MESSAGES.parse({"model": "m", "max_tokens": 9, "messages": list(messages), **more})


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def text(said: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": said, **more}


def call(**given: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": "toolu_1", "name": "send", "input": given}


def result(content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "toolu_1", "content": content, **more}


def message(*content: Any, **more: Any) -> dict[str, Any]:
    """An answer of the upstream."""
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": list(content),
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 3, "output_tokens": 4},
        **more,
    }


def fields(exchange: Exchange) -> list[Field]:
    """Those of the messages one by one."""
    return [field for field in exchange.fields if not field.is_joint]


def scanned(exchange: Exchange) -> list[tuple[str, str, str]]:
    return [(field.name, field.judged.role, field.judged.text) for field in fields(exchange)]


def said(answer: Answer) -> list[tuple[str, str]]:
    (choice,) = answer.choices
    assert all(field.judged.role == "response" for field in choice.fields)
    return [(field.name, field.judged.text) for field in choice.fields]


IMAGE = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="},
}


class TestRequests:
    def test_each_message_is_judged_in_the_context_of_those_before(self) -> None:
        exchange = parsed(user("a"), assistant("b"), user("c"), system="Be kind.")
        assert scanned(exchange) == [
            ("system", "prompt", "Be kind."),
            ("message", "prompt", "a"),
            ("text", "response", "b"),
            ("message", "prompt", "c"),
        ]
        assert [turn.text for turn in fields(exchange)[3].judged.context] == ["Be kind.", "a", "b"]
        assert [field.is_past for field in fields(exchange)] == [False, True, True, False]

    def test_an_assistants_message_at_the_end_is_a_prefill(self) -> None:
        exchange = parsed(user("a"), assistant([text("Sure, "), text("first")]))
        assert scanned(exchange)[1] == ("prefill", "response", "Sure, \nfirst")
        assert [field.is_past for field in fields(exchange)] == [False, False]

    def test_system_blocks_are_joined_as_the_model_reads_them(self) -> None:
        exchange = parsed(user("a"), system=[text("bo"), text("mb")])
        assert scanned(exchange)[0] == ("system", "prompt", "bomb")

    def test_a_tools_result_is_no_words_of_the_user(self) -> None:
        exchange = parsed(
            user("q"), assistant([call(to="ann")]), user([result("sent"), text("and now?")])
        )
        assert scanned(exchange) == [
            ("message", "prompt", "q"),
            ("tool_call", "response", "send\nto\nann"),
            ("tool_result", "prompt", "sent"),
            ("message", "prompt", "and now?"),
        ]
        last = fields(exchange)[-1]
        assert [(turn.speaker, turn.text) for turn in last.judged.context] == [
            ("user", "q"),
            ("tool", "sent"),
        ]
        assert [field.path for field in fields(exchange)[2:]] == [
            "messages[2].content[0].content",
            "messages[2].content",
        ]
        assert [field.is_past for field in fields(exchange)] == [True, True, False, False]

    @pytest.mark.parametrize(
        ("said", "expected"),
        [
            (user([text("x"), text("y")]), ("message", "prompt", "x\ny")),
            (user(["x"]), ("message", "prompt", "x")),
            ({"role": "system", "content": "s"}, ("system", "prompt", "s")),
            (user([text("x", citations=[{"cited_text": "c d"}])]), ("other", "prompt", None)),
            (assistant([call(a={"b": ["c\u00e9"]})]), ("tool_call", "response", "send\na\nb\ncé")),
            (
                assistant([{"type": "server_tool_use", "name": "search", "input": {"q": "x"}}]),
                ("tool_call", "response", "search\nq\nx"),
            ),
            (
                assistant([{"type": "thinking", "thinking": "hm", "signature": "f00"}]),
                ("reasoning", "response", "hm"),
            ),
            (user([result([text("r"), text("s")])]), ("tool_result", "prompt", "r\ns")),
            (
                user([result([{"type": "tool_reference", "tool_name": "rm"}])]),
                ("other", "prompt", "rm"),
            ),
            (user([result("r", note="n m")]), ("other", "prompt", "n m")),
            (
                user(
                    [{"type": "document", "title": "T t", "source": {"type": "text", "data": "d"}}]
                ),
                ("document", "prompt", "d"),
            ),
            (
                user(
                    [{"type": "document", "title": "T t", "source": {"type": "text", "data": "d"}}]
                ),
                ("other", "prompt", "T t"),
            ),
            (
                user([{"type": "document", "source": {"type": "content", "content": [text("d")]}}]),
                ("document", "prompt", "type\ntext\ntext\nd"),
            ),
            (
                user(
                    [
                        {
                            "type": "search_result",
                            "title": "t",
                            "source": "https://a.b",
                            "content": [text("found")],
                        }
                    ]
                ),
                ("document", "prompt", "t\nhttps://a.b\ntype\ntext\ntext\nfound"),
            ),
            (
                {
                    "role": "system",
                    "content": [
                        {
                            "type": "tool_addition",
                            "tool": {
                                "type": "tool_definition",
                                "definition": {"name": "rm", "description": "removes"},
                            },
                        }
                    ],
                },
                ("tool_definition", "prompt", "rm\nremoves"),
            ),
            (user([{"type": "of_tomorrow", "words": ["a b"]}]), ("other", "prompt", "a b")),
            ({**user("x"), "new_key": {"deep": ["t"]}}, ("other", "prompt", "deep\nt")),
        ],
    )
    def test_every_part_of_a_message_is_scanned(
        self, said: dict[str, Any], expected: tuple[str, str, str | None]
    ) -> None:
        found = scanned(parsed(user("q"), said, user("z")))
        name, role, what = expected
        if what is None:
            assert (name, role) in [piece[:2] for piece in found]
        else:
            assert expected in found

    def test_arguments_that_are_text_are_judged_as_they_stand_too(self) -> None:
        block = {"type": "tool_use", "id": "1", "name": "f", "input": '{"a":"p q","a":"s"}'}
        texts = [what for _, _, what in scanned(parsed(user("q"), assistant([block])))]
        assert any("p q" in what for what in texts)

    def test_tools_schemas_and_unknown_keys_are_scanned(self) -> None:
        exchange = parsed(
            user("q"),
            tools=[{"name": "f", "description": "does f", "input_schema": {"type": "object"}}],
            output_config={
                "effort": "low",
                "format": {
                    "type": "json_schema",
                    "schema": {"properties": {"a": {"title": "b c"}}},
                },
            },
            chat_template_kwargs={"persona": "a pirate"},
            stop_sequences=["END", "now stop here"],
            metadata={"user_id": "user_1"},
            tool_choice={"type": "tool", "name": "f"},
            thinking={"type": "enabled", "budget_tokens": 1024},
        )
        found = scanned(exchange)
        assert ("tool_definition", "prompt", "f\ndoes f") in found
        assert any(name == "other" and "b c" in what for name, _, what in found)
        rest = found[-1][2]
        assert "a pirate" in rest
        assert "now stop here" in rest
        assert not any(word in rest for word in ("user_1", "enabled", "low"))
        assert exchange.unscannable == ()

    @pytest.mark.parametrize(
        ("said", "place"),
        [
            (user([IMAGE]), "messages[0].content[0]"),
            (
                user([{"type": "image", "source": {"type": "url", "url": "https://a.b/c.png"}}]),
                "messages[0].content[0]",
            ),
            (user([text("see"), result([IMAGE])]), "messages[0].content[1].content[0]"),
            (assistant([{"type": "redacted_thinking", "data": "x"}]), "messages[0].content[0]"),
            (
                user([{"type": "document", "source": {"type": "base64", "data": "JVBERi0="}}]),
                "messages[0].content[0].source",
            ),
            (
                user([{"type": "document", "source": {"type": "file", "file_id": "file_1"}}]),
                "messages[0].content[0].source",
            ),
            (
                user([{"type": "document", "source": {"type": "content", "content": [IMAGE]}}]),
                "messages[0].content[0].source",
            ),
            (user([{"type": "search_result", "content": [IMAGE]}]), "messages[0].content[0]"),
            (user([{"type": "hologram", "source": {"type": "url"}}]), "messages[0].content[0]"),
            (user([{"type": "hologram", "at": "data:x/y;base64,AAAA"}]), "messages[0].content[0]"),
            (user([{"type": "hologram", "wave": {"raw": "QUJD" * 100}}]), "messages[0].content[0]"),
        ],
    )
    def test_what_nobody_here_can_read_is_said(self, said: dict[str, Any], place: str) -> None:
        assert parsed(said).unscannable == (place,)

    @pytest.mark.parametrize(
        "key", ["mcp_servers", "container", "chat_template", "kv_transfer_params"]
    )
    def test_what_is_fetched_or_run_elsewhere_is_unscannable(self, key: str) -> None:
        assert parsed(user("q"), **{key: ["x"]}).unscannable == (key,)

    @pytest.mark.parametrize(
        ("changes", "param"),
        [
            ({"model": None}, "model"),
            ({"model": 3}, "model"),
            ({"max_tokens": None}, "max_tokens"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_tokens": True}, "max_tokens"),
            ({"max_tokens": "9"}, "max_tokens"),
            ({"messages": None}, "messages"),
            ({"messages": []}, "messages"),
            ({"messages": "a"}, "messages"),
            ({"messages": ["a"]}, "messages[0]"),
            ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
            ({"messages": [{"role": [], "content": "a"}]}, "messages[0].role"),
            ({"messages": [user(3)]}, "messages[0].content"),
            ({"messages": [user([3])]}, "messages[0].content[0]"),
            ({"messages": [user([{"text": "a"}])]}, "messages[0].content[0]"),
            ({"messages": [user([text("a") | {"text": 3}])]}, "messages[0].content[0].text"),
            ({"messages": [user([result(3)])]}, "messages[0].content[0].content"),
            ({"system": 3}, "system"),
            ({"stream": "yes"}, "stream"),
            ({"moderation": "yes"}, "moderation"),
        ],
    )
    def test_a_malformed_request_names_the_key(self, changes: dict[str, Any], param: str) -> None:
        with pytest.raises(BadRequest) as caught:
            MESSAGES.parse({"model": "m", "max_tokens": 9, "messages": [user("a")], **changes})
        assert caught.value.param == param

    def test_our_own_key_is_the_only_one_taken_out(self) -> None:
        assert MESSAGES.forwarded(parsed(user("a"), top_k=3)) is None
        asked = {"policy": {"input": {"mode": "block"}}}
        exchange = parsed(user("a"), top_k=3, moderation=asked)
        assert exchange.moderation == ModerationRequest(True, False)
        assert MESSAGES.forwarded(exchange) == {
            "model": "m",
            "max_tokens": 9,
            "messages": [user("a")],
            "top_k": 3,
        }


class Planter:
    """Plants sentences, no two of them alike, and remembers where."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.planted: list[str] = []

    def sentence(self) -> str:
        self.planted.append(f"<planted {len(self.planted)} here>")
        return self.planted[-1]

    def pick(self, *kinds: str) -> str:
        return self.draw(st.sampled_from(kinds))

    def chance(self) -> bool:
        return self.draw(st.booleans())

    def value(self, depth: int = 2) -> Any:
        kind = self.pick("text", "number", *(("list", "object") if depth else ()))
        if kind == "list":
            return [self.value(depth - 1) for _ in range(self.draw(st.integers(0, 2)))]
        if kind == "object":
            keys = self.draw(st.lists(st.sampled_from("abc"), max_size=2, unique=True))
            made = {key: self.value(depth - 1) for key in keys}
            return made | {self.sentence(): 1} if self.chance() else made
        return self.sentence() if kind == "text" else 7

    def extended(self, block: dict[str, Any]) -> dict[str, Any]:
        """``block`` with keys that its kind does not have, or that hold words as a rule."""
        for key in ("type_of", "title", "citations", "cache_control", "id", "signature", "name"):
            if self.draw(st.integers(0, 9)) == 0:
                block[key] = block[key] if key in block else self.value()
        return block

    def source(self) -> dict[str, Any]:
        kind = self.pick("base64", "url", "file", "text", "content", "odd")
        return self.extended(
            {"type": kind, "data": self.value(), "content": self.content(0), "url": self.sentence()}
        )

    def block(self, depth: int) -> Any:
        kind = self.pick(
            "string", "text", "tool_use", "tool_result", "thinking", "redacted_thinking", "image",
            "document", "search_result", "tool_reference", "tool_addition", "tool_removal",
            "mcp_tool_use", "web_search_tool_result", "of_tomorrow", "sentence",
        )  # fmt: skip
        if kind == "string":
            return self.sentence()
        block: dict[str, Any] = {"type": self.sentence() if kind == "sentence" else kind}
        if kind in ("text", "thinking"):
            block[kind] = self.sentence()
        elif kind.endswith("tool_use"):
            given = self.value()
            is_text = self.chance()
            block |= {"name": self.sentence(), "input": json.dumps(given) if is_text else given}
        elif kind.endswith("tool_result"):
            block["content"] = self.content(depth - 1)
        elif kind in ("image", "document"):
            block["source"] = self.source()
        elif kind == "redacted_thinking":
            block["data"] = self.sentence()
        elif kind in ("tool_addition", "tool_removal"):
            definition = {"name": "f", "description": self.sentence(), "input_schema": self.value()}
            block["tool"] = self.extended({"type": "tool_definition", "definition": definition})
        else:
            block |= {
                "tool_name": self.sentence(),
                "source" if self.chance() else "x": self.value(),
            }
            block["content"] = self.content(0)
        return self.extended(block)

    def content(self, depth: int) -> Any:
        if depth <= 0 or self.chance():
            return self.sentence()
        return [self.block(depth) for _ in range(self.draw(st.integers(0, 3)))]

    def message(self) -> dict[str, Any]:
        role = self.pick("user", "assistant", "system")
        return self.extended({"role": role, "content": self.content(2)})


@st.composite
def requests(draw: st.DrawFn) -> tuple[dict[str, Any], list[str]]:
    planter = Planter(draw)
    body: dict[str, Any] = {
        "model": "m",
        "max_tokens": 9,
        "messages": [planter.message() for _ in range(draw(st.integers(1, 3)))],
    }
    for key in (
        "system", "tools", "output_config", "stop_sequences", "metadata", "tool_choice", "thinking",
        "mcp_servers", "container", "kv_transfer_params", "vllm_xargs", "of_tomorrow",
    ):  # fmt: skip
        if draw(st.integers(0, 3)):
            continue
        if key == "system":
            body[key] = planter.content(1)
        elif key == "output_config":
            body[key] = {"effort": planter.value(), "format": planter.value()}
        else:
            body[key] = planter.value()
    return body, planter.planted


@st.composite
def answers(draw: st.DrawFn) -> tuple[dict[str, Any], list[str]]:
    planter = Planter(draw)
    body = message(*[planter.block(2) for _ in range(draw(st.integers(0, 3)))])
    for key in ("id", "model", "stop_reason", "stop_sequence", "usage", "of_tomorrow"):
        if draw(st.integers(0, 4)) == 0:
            body[key] = planter.value()
    return body, planter.planted


def below(value: Any, path: str, paths: frozenset[str]) -> Iterator[str]:
    """The JSON of all that stands under ``paths``."""
    if path in paths:
        yield json.dumps(value, ensure_ascii=False)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from below(item, f"{path}.{key}" if path else key, paths)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from below(item, f"{path}[{number}]", paths)


class TestWhatIsScannedCoversWhatIsForwarded:
    @settings(max_examples=100, deadline=None)
    @given(requests())
    def test_in_a_request(self, case: tuple[dict[str, Any], list[str]]) -> None:
        body, planted = case
        exchange = MESSAGES.parse(body)
        read = "\n".join(field.judged.text for field in exchange.fields)
        unread = "\n".join(below(body, "", frozenset(exchange.unscannable)))
        assert [one for one in planted if one not in read and one not in unread] == []

    @settings(max_examples=100, deadline=None)
    @given(answers())
    def test_in_an_answer(self, case: tuple[dict[str, Any], list[str]]) -> None:
        body, planted = case
        answer = MESSAGES.parse_answer(parsed(user("q")), body)
        read = "\n".join(field.judged.text for field in answer.choices[0].fields)
        unread = "\n".join(below(body, "", frozenset(answer.unscannable)))
        assert [one for one in planted if one not in read and one not in unread] == []


class TestAnswers:
    EXCHANGE = parsed(user("q"), system="s")

    def test_an_answer_of_vllm(self) -> None:
        thought = {"type": "thinking", "thinking": "hm", "signature": "0f" * 16}
        body = message(thought, text("Paris."), call(to="ann"), stop_reason="tool_use")
        answer = MESSAGES.parse_answer(self.EXCHANGE, body)
        assert said(answer) == [
            ("text", "Paris."),
            ("reasoning", "hm"),
            ("tool_call", "send\nto\nann"),
        ]
        (choice,) = answer.choices
        assert [turn.text for turn in choice.fields[0].judged.context] == ["s", "q"]
        assert choice.body == {
            "content": body["content"],
            "stop_reason": "tool_use",
            "stop_sequence": None,
        }
        assert (answer.prompt_tokens, answer.completion_tokens) == (3, 4)
        assert answer.body is body

    def test_tokens_from_a_cache_count(self) -> None:
        usage = {"input_tokens": 3, "cache_read_input_tokens": 16, "output_tokens": 4}
        answer = MESSAGES.parse_answer(self.EXCHANGE, message(text("a"), usage=usage))
        assert (answer.prompt_tokens, answer.completion_tokens) == (19, 4)

    def test_a_stop_sequence_and_unknown_keys_are_judged(self) -> None:
        body = message(text("a"), stop_sequence="two words", new={"k": "v w"})
        texts = "\n".join(what for _, what in said(MESSAGES.parse_answer(self.EXCHANGE, body)))
        assert "two words" in texts
        assert "v w" in texts

    def test_what_cannot_be_scanned_is_said(self) -> None:
        answer = MESSAGES.parse_answer(self.EXCHANGE, message(text("a"), IMAGE))
        assert answer.unscannable == ("content[1]",)

    @pytest.mark.parametrize("body", [{}, {"content": None}, {"content": "x"}, {"content": {}}])
    def test_a_body_that_is_no_message_cannot_be_judged(self, body: dict[str, Any]) -> None:
        with pytest.raises(UpstreamMalformed):
            MESSAGES.parse_answer(self.EXCHANGE, body)

    @pytest.mark.parametrize("block", [3, {}, {"type": 3}, {"type": "text", "text": 3}])
    def test_nor_can_a_block_that_is_none(self, block: Any) -> None:
        with pytest.raises(BadRequest):
            MESSAGES.parse_answer(self.EXCHANGE, message(block))


class TestRendering:
    @pytest.mark.parametrize(
        ("finish_reason", "stop_reason"), [("stop", "end_turn"), ("content_filter", "refusal")]
    )
    def test_a_refusal_reads_as_a_message(self, finish_reason: Any, stop_reason: str) -> None:
        answer = MESSAGES.refused(parsed(user("q")), "id1", 7, Refusal("No.", finish_reason))
        shown = MESSAGES.assembled(answer, answer.choices)
        assert shown == {
            "id": "msg_id1",
            "type": "message",
            "role": "assistant",
            "model": "m",
            "content": [text("No.")],
            "stop_reason": stop_reason,
            "stop_sequence": None,
            "usage": {"input_tokens": 0, "output_tokens": 0},
        }

    def test_under_a_schema_the_refusal_stands_where_parsers_do_not_look(self) -> None:
        exchange = parsed(user("q"), output_config={"format": {"type": "json_schema"}})
        body = MESSAGES.refused_choice(exchange, 0, REFUSAL).body
        assert (body["content"], body["stop_reason"]) == ([], "refusal")
        assert body["stop_details"]["explanation"] == "No."

    def test_a_refused_answer_keeps_nothing_that_was_said_beside_it(self) -> None:
        exchange = parsed(user("q"))
        body = message(text("bad"), model="not a word", events=[{"x": "bad"}], bad="bad")
        answer = MESSAGES.parse_answer(exchange, body)
        shown = MESSAGES.assembled(answer, (MESSAGES.refused_choice(exchange, 0, REFUSAL),))
        assert "bad" not in json.dumps(shown)
        assert shown.keys() == message().keys() - {"model"}
        assert (shown["id"], shown["usage"]) == ("msg_1", body["usage"])

    @pytest.mark.parametrize(
        ("system", "expected"),
        [
            ({}, "I"),
            ({"system": None}, "I"),
            ({"system": ""}, "I"),
            ({"system": "S"}, "S\n\nI"),
            ({"system": [text("S")]}, [text("S"), text("\n\nI")]),
            ({"system": []}, [text("I")]),
        ],
    )
    def test_a_retry_instructs_in_the_system_prompt(
        self, system: dict[str, Any], expected: Any
    ) -> None:
        exchange = parsed(user("q"), temperature=1, moderation={}, **system)
        body = MESSAGES.retried(exchange, RETRY)
        assert body == {
            "model": "m",
            "max_tokens": 9,
            "messages": [user("q")],
            "temperature": 1,
            "system": expected,
        }
        assert exchange.body.get("system") == system.get("system")

    @pytest.mark.parametrize(
        ("error", "kind"),
        [
            (errors.Unscannable("x"), "invalid_request_error"),
            (errors.UnknownModel("x"), "not_found_error"),
            (errors.BodyTimeout("x"), "invalid_request_error"),
            (errors.TooLarge("x"), "request_too_large"),
            (errors.Overloaded("x"), "rate_limit_error"),
            (errors.SluicegateError("x"), "api_error"),
            (errors.UpstreamMalformed("x"), "api_error"),
            (errors.UpstreamTimeout("x"), "api_error"),
            (errors.GuardUnavailable("x"), "overloaded_error"),
        ],
    )
    def test_an_error_has_anthropics_shape_and_our_code(
        self, error: SluicegateError, kind: str
    ) -> None:
        shown = MESSAGES.error(error, "id1")
        assert (shown["type"], shown["request_id"]) == ("error", "id1")
        assert (shown["error"]["type"], shown["error"]["message"]) == (kind, "x")
        assert shown["error"]["code"] == error.code
