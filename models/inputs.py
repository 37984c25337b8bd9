"""How a conversation becomes the token windows that a guard sees.

The only place that does this, in training and in serving. ``VERSION`` is written in each
checkpoint's card; a checkpoint of another version is refused.

A window is ``[CLS] context [SEP] role target [SEP]`` (the special tokens are the tokenizer's own),
where ``role`` is the word *prompt* or *response*; a line break stands where the tokenizer puts no
special token between two texts, or none after. The context is the turns before the target,
oldest first; it is cut from its far end to ``CONTEXT_TOKENS``. A target that does not fit is
split into windows that overlap, so that all of it is judged. A text whose words are hidden from
filters (``disguise``) is judged as it stands and by what it says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from tokenizers import Encoding, Tokenizer

from models.disguise import revealed
from models.taxonomy import ROLES, Role
from models.verdict import Coverage

VERSION: Final = 2
WINDOW_TOKENS: Final = 256
CONTEXT_TOKENS: Final = 96
OVERLAP_TOKENS: Final = 32

# WordPiece reads a longer run of letters as one unknown symbol, which would hide it.
_LONGEST_WORD: Final = 90
_LONG_RUN: Final = re.compile(rf"\S{{{_LONGEST_WORD}}}(?=\S)")
# A turn longer than this cannot fit the context budget; its end is what is kept.
_CONTEXT_CHARACTERS: Final = CONTEXT_TOKENS * 16

# A text up to this long is encoded in a few milliseconds at most.
_SHORT_CHARACTERS: Final = 4000

Speaker = Literal["user", "assistant", "system", "tool"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the conversation before the target."""

    speaker: Speaker
    text: str


@dataclass(frozen=True, slots=True)
class GuardInput:
    """What is judged: ``text`` in its ``role``, with the turns before it, oldest first.

    For a response the context holds at least the user turn that it answers.
    """

    role: Role
    text: str
    context: tuple[Turn, ...] = ()


@dataclass(frozen=True, slots=True)
class Window:
    """One row of a batch. The first ``context_length`` ids are segment 0, the rest segment 1."""

    token_ids: tuple[int, ...]
    context_length: int

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Windows:
    """All windows of one input, and how much of the text they cover."""

    windows: tuple[Window, ...]
    coverage: Coverage


@dataclass(frozen=True, slots=True)
class _Frame:
    """What stands around a piece of the target in each of its windows."""

    head: list[int]
    context_length: int
    role: list[int]
    after: tuple[int, ...]

    def around(self, ids: Sequence[int]) -> tuple[Window, ...]:
        """Windows that cover ``ids``."""
        room = WINDOW_TOKENS - len(self.head) - len(self.role) - len(self.after)
        return tuple(
            Window(
                (*self.head, *self.role, *ids[start : start + room], *self.after),
                self.context_length,
            )
            for start in _starts(len(ids), room)
        )


class InputEncoder:
    """Turns inputs into windows with one tokenizer. Safe to call from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._roles: dict[Role, list[int]] = {role: self._encode(role).ids for role in ROLES}
        marker = self._encode("prompt")
        alone = _specials(tokenizer.post_process(marker))
        paired = _specials(tokenizer.post_process(marker, marker))
        # Decoders (Qwen, Llama) put nothing there. They need what ends the context, and one token
        # that ends every text, since they are read at the last.
        line_break = tuple(self._encode("\n").ids)
        self._alone = alone[0], alone[-1] or line_break
        between = paired[1] if len(paired) > 2 else line_break
        self._paired = paired[0], between, paired[-1] or line_break
        # A Unigram model does not tell which of its tokens is the unknown one.
        names = (getattr(tokenizer.model, "unk_token", None), "<unk>", "[UNK]")
        ids = (tokenizer.token_to_id(name) for name in names if name)
        self._unknown_id = next((token for token in ids if token is not None), None)

    def encode(self, item: GuardInput) -> Windows:
        """Windows of ``item``; at least one, each at most ``WINDOW_TOKENS`` long.

        Where words are hidden from filters, windows of what they say follow those of the text.
        """
        context = self._context(item.context)
        if context:
            before, between, after = self._paired
            head = [*before, *context, *between]
        else:
            before, after = self._alone
            head = list(before)
        frame = _Frame(head, len(head) if context else 0, self._roles[item.role], after)
        target = self._encode(_LONG_RUN.sub(_broken, item.text))
        windows = frame.around(target.ids)
        shown = revealed(item.text)
        if shown is not None:
            windows += frame.around(self._encode(_LONG_RUN.sub(_broken, shown)).ids)
        total = len(item.text)
        judged = max(total - self._unknown_characters(target), 0)
        return Windows(windows, Coverage(judged, total, len(windows)))

    def _encode(self, text: str) -> Encoding:
        if len(text) <= _SHORT_CHARACTERS:
            return self._tokenizer.encode(text, add_special_tokens=False)
        # Of the two, only this one lets other threads run meanwhile, which may be for seconds.
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=False)
        return encoding

    def _context(self, turns: Sequence[Turn]) -> list[int]:
        """The newest ``CONTEXT_TOKENS`` token ids of the turns."""
        room = _CONTEXT_CHARACTERS
        kept: list[str] = []
        for turn in reversed(turns):
            if room <= 0:
                break
            text = _LONG_RUN.sub(_broken, turn.text[-room:])
            kept.append(f"{turn.speaker}: {text}")
            room -= len(text)
        if not kept:
            return []
        return self._encode("\n".join(reversed(kept))).ids[-CONTEXT_TOKENS:]

    def _unknown_characters(self, target: Encoding) -> int:
        if self._unknown_id is None or self._unknown_id not in target.ids:
            return 0
        pairs = zip(target.ids, target.offsets, strict=True)
        return sum(end - start for token, (start, end) in pairs if token == self._unknown_id)


def _starts(length: int, room: int) -> range:
    """Where windows of ``room`` tokens begin so that they cover ``length`` with the overlap."""
    if length <= room:
        return range(1)
    return range(0, length - OVERLAP_TOKENS, room - OVERLAP_TOKENS)


def _specials(encoding: Encoding) -> tuple[tuple[int, ...], ...]:
    """The runs of special token ids around and between the sequences of ``encoding``."""
    runs: list[list[int]] = [[]]
    previous_special = True
    for token, special in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
        if special:
            if not previous_special:
                runs.append([])
            runs[-1].append(token)
        previous_special = bool(special)
    if not previous_special:
        runs.append([])
    return tuple(tuple(run) for run in runs)


def _broken(match: re.Match[str]) -> str:
    return match.group() + " "
