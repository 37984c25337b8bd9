"""What is replaced in a kept text, what is left, and that it takes time in proportion."""

import time

import pytest

from service.redaction import redacted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("write to ann.lee+x@mail.example.org now", "write to [email] now"),
        ("call +49 (0)30 1234-5678 today", "call [phone] today"),
        ("call (030) 1234 5678", "call [phone]"),
        ("or 555-123-4567.", "or [phone]."),
        ("card 4111 1111 1111 1111 ok", "card [number] ok"),
        ("card 4111-1111-1111-1111", "card [number]"),
        ("iban DE89 3704 0044 0532 0130 00 thanks", "iban [account] thanks"),
        ("iban GB29NWBK60161331926819", "iban [account]"),
        ("from 192.168.0.17 to 10.0.0.1.", "from [ip] to [ip]."),
        ("at 2001:db8::ff00:42:8329 it", "at [ip] it"),
        ("key sk-abcDEF1234567890abcdef", "key [key]"),
        ("ghp_16C7e42F292c6912E7710c838347Ae178B4a", "[key]"),
        ("AKIAIOSFODNN7EXAMPLE", "[key]"),
        ("my password is hunter2 ok", "my [key] ok"),
        ('"api_key": "hunter2"', '"[key]'),
        ("Authorization: Bearer abcdefghijklmnop", "Authorization: [key]"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl", "[key]"),
        ("digest 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822c", "digest [key]"),
        # The same in full-width characters, Arabic digits, and with an invisible one inside.
        ("ａｎｎ＠ｍａｉｌ．ｅｘａｍｐｌｅ", "[email]"),
        ("٤١١١ ١١١١ ١١١١ ١١١١", "[number]"),
        ("41\u200b11 1111 1111 1111", "[number]"),
    ],
)
def test_it_is_replaced(text: str, shown: str) -> None:
    assert redacted(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "In 2024 there were 1,250 of them, 3.14 each; version 10.2.3 of it.",
        "We meet at 12:30:15 on 2026-01-31, @ the corner.",
        "The tokens of a sentence, std::vector and Shape::new.",
        "antidisestablishmentarianism-and-other-extraordinarily-long-words",
        "Grüße aus Köln, 東京 and Київ.",
    ],
)
def test_it_is_left(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize(
    "piece",
    [
        "a",
        "1",
        "@",
        "a@",
        "a.",
        "1 ",
        "(1)",
        ":",
        "a:",
        "::",
        "=",
        "-",
        "eyJaaaaaaaa",
        "eyJ",
        "\u200b",
        "A1",
    ],
)
def test_its_time_grows_no_faster_than_the_text(piece: str) -> None:
    def seconds(characters: int) -> float:
        text = (piece * characters)[:characters]
        took = []
        for _ in range(3):
            started = time.process_time()
            redacted(text)
            took.append(time.process_time() - started)
        return min(took)

    # Eight times the text would take 64 times as long if the time were quadratic.
    assert seconds(32_000) < 24 * seconds(4000) + 0.02
