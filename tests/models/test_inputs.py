"""How conversations become windows: the contract between training and serving."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.inputs import (
    CONTEXT_TOKENS,
    OVERLAP_TOKENS,
    WINDOW_TOKENS,
    GuardInput,
    InputEncoder,
    Turn,
)
from tests.models.tokenizers import byte_tokenizer, unigram_tokenizer, word_tokenizer

ENCODER = InputEncoder(word_tokenizer())
CLS, SEP, UNK = 1, 2, 0


def words(*ids: int) -> str:
    return " ".join(f"w{i}" for i in ids)


def decoded(ids: tuple[int, ...]) -> str:
    return word_tokenizer().decode(list(ids), skip_special_tokens=False)


def test_a_prompt_alone_is_one_window_with_its_role() -> None:
    encoded = ENCODER.encode(GuardInput("prompt", words(1, 2)))
    assert [decoded(w.token_ids) for w in encoded.windows] == ["[CLS] prompt w1 w2 [SEP]"]
    assert encoded.windows[0].context_length == 0


def test_a_response_stands_behind_the_turn_that_it_answers() -> None:
    item = GuardInput("response", words(3), (Turn("user", words(1)), Turn("assistant", words(2))))
    (window,) = ENCODER.encode(item).windows
    text = decoded(window.token_ids)
    assert text == "[CLS] user : w1 assistant : w2 [SEP] response w3 [SEP]"
    assert window.context_length == text.split().index("response")


def test_a_text_that_hides_its_words_is_judged_by_what_it_says_too() -> None:
    hidden = "\u200b".join("w3") + " " + words(4)
    encoded = ENCODER.encode(GuardInput("response", hidden, (Turn("user", words(1)),)))
    raw, shown = (decoded(window.token_ids) for window in encoded.windows)
    assert "w3 w4" not in raw
    assert shown == "[CLS] user : w1 [SEP] response w3 w4 [SEP]"
    assert encoded.coverage.windows == 2
    assert encoded.coverage.characters_total == len(hidden)


def test_context_is_cut_from_its_far_end() -> None:
    turns = (Turn("user", words(*range(50))), Turn("assistant", words(*range(50, 140))))
    (window,) = ENCODER.encode(GuardInput("response", "w7", turns)).windows
    kept = decoded(window.token_ids).split("[SEP]")[0].split()
    assert len(kept) == CONTEXT_TOKENS + 1
    assert kept[-1] == "w139"


def test_long_text_is_judged_whole_in_overlapping_windows() -> None:
    item = GuardInput("prompt", words(*range(900)))
    windows = ENCODER.encode(item).windows
    assert all(len(w) <= WINDOW_TOKENS for w in windows)
    bodies = [w.token_ids[2:-1] for w in windows]
    assert all(left[-OVERLAP_TOKENS:] == right[:OVERLAP_TOKENS] for left, right in pairwise(bodies))


@given(st.integers(0, 2000), st.integers(0, 300))
def test_every_target_token_is_in_some_window(target: int, context: int) -> None:
    turns = (Turn("user", words(*range(context))),) if context else ()
    encoded = ENCODER.encode(GuardInput("response", words(*range(target)), turns))
    seen = {i for w in encoded.windows for i in w.token_ids[w.context_length :]}
    expected = set(word_tokenizer().encode(words(*range(target)), add_special_tokens=False).ids)
    assert expected <= seen
    assert all(len(w) <= WINDOW_TOKENS for w in encoded.windows)
    # No window is a mere tail of the one before it.
    assert len({w.token_ids for w in encoded.windows}) == len(encoded.windows)


def test_a_run_without_blanks_is_broken_up_rather_than_read_as_one_unknown_symbol() -> None:
    text = "w1" * 500
    windows = ENCODER.encode(GuardInput("prompt", text)).windows
    assert sum(UNK in w.token_ids for w in windows) >= 1
    assert max(w.token_ids.count(UNK) for w in windows) >= 1000 // 91


def test_coverage_counts_the_characters_that_the_vocabulary_lacks() -> None:
    coverage = ENCODER.encode(GuardInput("prompt", "w1 ☂☂☂ w2")).coverage
    assert (coverage.characters_judged, coverage.characters_total) == (6, 9)


def test_an_empty_text_is_one_window() -> None:
    encoded = ENCODER.encode(GuardInput("prompt", ""))
    assert [decoded(w.token_ids) for w in encoded.windows] == ["[CLS] prompt [SEP]"]
    assert encoded.coverage.characters_total == 0


@pytest.mark.parametrize(
    ("single", "pair", "prompt", "response"),
    [
        # RoBERTa, MPNet
        (
            "<s> $A </s>",
            "<s> $A </s> </s> $B </s>",
            "<s>promptw</s>",
            "<s>user: v</s></s>responsew</s>",
        ),
        # Llama: nothing ends a text
        ("<s> $A", "<s> $A <s> $B", "<s>promptw\n", "<s>user: v<s>responsew\n"),
        # Qwen: no special token at all
        ("$A", "$A $B", "promptw\n", "user: v\nresponsew\n"),
        # Qwen3-Embedding
        ("$A </s>", "$A $B </s>", "promptw</s>", "user: v\nresponsew</s>"),
    ],
)
def test_any_tokenizer_shows_where_the_context_and_the_text_end(
    single: str, pair: str, prompt: str, response: str
) -> None:
    tokenizer = byte_tokenizer(single, pair)
    encoder = InputEncoder(tokenizer)
    (alone,) = encoder.encode(GuardInput("prompt", "w")).windows
    (behind,) = encoder.encode(GuardInput("response", "w", (Turn("user", "v"),))).windows
    texts = [
        tokenizer.decode(list(w.token_ids), skip_special_tokens=False) for w in (alone, behind)
    ]
    assert texts == [prompt, response]
    target = tokenizer.decode(list(behind.token_ids[behind.context_length :]))
    assert target.startswith("responsew")


def test_windows_of_a_decoder_are_as_long_and_end_alike() -> None:
    encoder = InputEncoder(byte_tokenizer("$A", "$A $B"))
    windows = encoder.encode(GuardInput("response", "x" * 900, (Turn("user", "v" * 300),))).windows
    assert len(windows) > 1
    assert max(map(len, windows)) == WINDOW_TOKENS
    assert len({w.token_ids[-1] for w in windows}) == 1


def test_coverage_knows_the_unknown_symbol_of_any_kind_of_model() -> None:
    coverage = InputEncoder(unigram_tokenizer()).encode(GuardInput("prompt", "ab☂☂c")).coverage
    assert (coverage.characters_judged, coverage.characters_total) == (3, 5)
