"""What a stream lets through: labelled answers, word by word, through the gate with a guard.

    .venv/bin/python -m benchmarks.streamed_answers --data-directory DATA [--guard DIR]
        [--answers 500] [--judgement-words 2] [--json FILE]

No server runs: each answer is driven through ``Gate`` and ``Flow`` as ``service/streaming.py``
does in ``hold``, under the default policy, its prompt taken as allowed. A verdict comes after so
many more words of the stream; what grows meanwhile waits. The client sees whole words. An answer
that would be generated again ends there. All answers go in step, so that the guard gets batches.

Where harm begins is known of some harmful answers (``training/labels/first_harm.jsonl``). Of the
others the first sentence counts as the first harmful one: harm released is then at most, and
caught in time at least, what the figure says. Half the answers are harmful; only rows that
calibration does not read are taken.
"""

from __future__ import annotations

import argparse
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from tokenizers import Tokenizer

from benchmarks import measure
from models.checkpoint import DEFAULT_GUARD, TOKENIZER
from models.guard import Guard
from models.inputs import GuardInput
from models.text_guard import TextGuard
from models.verdict import Verdict, nothing
from service.exchange import Field
from service.flow import Flow
from service.gate import (
    Command,
    Cut,
    Gate,
    Generate,
    Generated,
    Grown,
    Judge,
    JudgePieces,
    PiecesJudged,
    PromptJudged,
    Refuse,
    Release,
    ReleaseUpTo,
    ResponseJudged,
    Stop,
)
from service.policy import Action, Decision, Policy, decide, strongest
from training.bootstrap import Counts, Figures, measured
from training.judging import judge_all
from training.labelled import data_file, read_examples, read_rows
from training.scores import Floats, ratio
from training.split import CALIBRATION_SHARE, normal, position
from training.streams import GRACE, Stream, stream
from training.suite import sample

FILES: Final = ("dev/beavertails_30k_test.jsonl", "annotated/severity_dev.jsonl")
FIRST_HARM: Final = "labels/first_harm.jsonl"

Fate = Literal["whole", "cut", "regenerated", "refused"]
"""``regenerated`` and ``refused``: before anything of it was released."""
Steps = Generator[Sequence[GuardInput], list[Verdict], None]
"""Gives what is to be judged, and takes the verdicts."""

_WORD: Final = re.compile(r"\s*\S+|\s+\Z")
"""As most tokenizers have it, with the blanks before it."""


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-directory", type=Path, required=True)
    parser.add_argument("--guard", type=Path, default=DEFAULT_GUARD)
    parser.add_argument("--answers", type=int, default=500, help="half of them harmful")
    parser.add_argument("--judgement-words", type=int, default=2, help="of stream a verdict takes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    guard = TextGuard(options.guard)
    tokenizer = Tokenizer.from_file(str(options.guard / TOKENIZER))
    streams = read_streams(options.data_directory, options.answers, options.seed)
    replays = replay(guard, streams, delay=options.judgement_words)
    whole = flagged_whole(guard, streams)
    figures = summary(
        streams,
        replays,
        whole,
        lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids),
        seed=options.seed,
    )
    print(as_markdown(figures))
    if options.json:
        settings = {"guard": guard.id, "judgement_words": options.judgement_words}
        result = {"benchmark": "streamed_answers", "machine": measure.machine(), **settings}
        options.json.write_text(json.dumps(result | figures, indent=2) + "\n", encoding="utf-8")


def read_streams(directory: Path, answers: int, seed: int) -> list[Stream]:
    """Harmful answers, first those whose harm is located, and as many harmless ones."""
    labels = read_rows(data_file(directory, FIRST_HARM))
    located = {row["id"]: row["first_harmful_end"] for _, row in labels}
    # The same answer may stand in both files.
    rows = {
        (normal(row.prompt), row.text): row
        for name in reversed(FILES)
        for row in read_examples(directory / name)
        if row.role == "response" and row.text.strip()
        if position(row.prompt) >= CALIBRATION_SHARE
    }
    every = [stream(row, located.get(row.id) if row.unsafe else None) for row in rows.values()]
    harmful = [one for one in every if one.example.unsafe]
    known = [one for one in harmful if one.first_harmful is not None]
    unknown = [one for one in harmful if one.first_harmful is None]
    harmless = [one for one in every if one.example.unsafe is False]
    half = answers // 2
    chosen = sample(known, half, seed)
    chosen += sample(unknown, half - len(chosen), seed)
    return chosen + sample(harmless, half, seed)


# --- One answer --------------------------------------------------------------------------------
class Replay:
    """One answer that streams in, and what became of it."""

    def __init__(self, item: GuardInput, policy: Policy, delay: int) -> None:
        self.fate: Fate | None = None
        self.released = 0
        """Characters that the client has seen."""
        self.judgements = 0
        self.judged_tokens = 0
        self.held: list[int] = []
        """At each release, characters that had come and were not released before it."""
        self._item = item
        self._policy = policy
        self._delay = delay
        self._gate = Gate.of(policy, is_stream=True)
        self._flow = Flow(item.context)
        self._word_ends: list[int] = []
        self._coming: Decision | None = None
        """The decision on the piece that is being judged."""
        self._judging = 0
        self._since = 0
        """Words that have come since it was asked for."""

    @property
    def come(self) -> int:
        """Characters that the upstream had sent."""
        return self._flow.position

    @property
    def is_stopped(self) -> bool:
        """Whether the client did not get the answer."""
        return self.fate != "whole"

    def steps(self) -> Steps:
        """Runs it to its end."""
        yield from self._obey(self._gate.start())
        allowed = PromptJudged(decide(self._policy, "prompt", nothing("prompt")))
        yield from self._obey(self._gate.feed(allowed))
        for word in _WORD.findall(self._item.text):
            self._flow.add("text", "text", word)
            self._word_ends.append(self.come)
            self._since += 1
            end = self._flow.due()
            if end is not None:
                yield from self._obey(self._gate.feed(Grown({0: end})))
            while self._coming is not None and self._since >= self._delay:
                yield from self._piece_judged()
            if self.fate is not None:
                return
        yield from self._obey(self._gate.feed(Generated((0,), self._tokens())))
        if self._coming is not None:
            yield from self._piece_judged()
        assert self.fate is not None

    def _piece_judged(self) -> Steps:
        decision, self._coming = self._coming, None
        assert decision is not None
        self._flow.judged(self._judging, decision.verdict.severity_score)
        yield from self._obey(self._gate.feed(PiecesJudged({0: decision})))

    def _obey(self, commands: Sequence[Command]) -> Steps:
        for command in commands:
            match command:
                case JudgePieces(ends):
                    self._judging, self._since = ends[0], 0
                    self._coming = yield from self._judged(self._flow.fields(ends[0]))
                case Judge("response"):
                    decision = yield from self._judged(self._flow.fields(self.come))
                    yield from self._obey(self._gate.feed(ResponseJudged({0: decision})))
                case ReleaseUpTo(ends):
                    self._release(ends[0])
                case Release():
                    self._release(self.come)
                    self.fate = "whole"
                case Cut():
                    self.fate = "cut"
                case Refuse():
                    self.fate = self.fate or "refused"
                case Stop():
                    yield from self._obey(self._gate.feed(Generated((), self._tokens())))
                case Generate(attempt) if attempt > 1:
                    self.fate = "regenerated"

    def _judged(
        self, fields: Sequence[Field]
    ) -> Generator[Sequence[GuardInput], list[Verdict], Decision]:
        verdicts = [nothing("response")]
        if fields:
            self.judgements += 1
            verdicts = yield [field.judged for field in fields]
        return strongest(decide(self._policy, "response", verdict) for verdict in verdicts)

    def _release(self, end: int) -> None:
        words = bisect_right(self._word_ends, end)
        if words and self._word_ends[words - 1] > self.released:
            self.held.append(self.come - self.released)
            self.released = self._word_ends[words - 1]

    def _tokens(self) -> int:
        return self.come // 4


def replay(
    guard: Guard, streams: Sequence[Stream], *, delay: int, policy: Policy | None = None
) -> list[Replay]:
    """What became of each answer."""
    policy = policy or Policy()
    replays = [Replay(one.example.guard_input(), policy, delay) for one in streams]
    running = {number: one.steps() for number, one in enumerate(replays)}
    verdicts: Iterator[Verdict] = iter(())
    asked: dict[int, Sequence[GuardInput]] = {}
    while running:
        for number, steps in [*running.items()]:
            try:
                if number in asked:
                    asked[number] = steps.send([next(verdicts) for _ in asked[number]])
                else:
                    asked[number] = next(steps)
            except StopIteration:
                del running[number]
                asked.pop(number, None)
        for number, items in asked.items():
            windows = (window for item in items for window in guard.prepare(item).windows)
            replays[number].judged_tokens += sum(map(len, windows))
        # In the order of ``running``, which is that of their numbers.
        every = [item for number in running for item in asked[number]]
        verdicts = iter(judge_all(guard, every))
    return replays


def flagged_whole(guard: Guard, streams: Sequence[Stream]) -> list[bool]:
    """Which answers the same guard and policy stop where they are judged as a whole."""
    verdicts = judge_all(guard, [one.example.guard_input() for one in streams])
    policy = Policy()
    return [decide(policy, "response", one).action >= Action.REGENERATE for one in verdicts]


# --- What it comes to --------------------------------------------------------------------------
def has_released_harm(item: Stream, one: Replay) -> bool:
    """Whether the client has seen a harmful sentence to its end."""
    text = item.example.text
    return one.released >= len(text[: item.ends[item.first_harmful or 0]].rstrip())


def is_in_time(item: Stream, one: Replay) -> bool:
    """Whether it was stopped, and nothing released beyond ``GRACE`` sentences after the first
    harmful one.
    """
    last = min((item.first_harmful or 0) + GRACE, len(item.ends) - 1)
    return one.is_stopped and one.released <= item.ends[last]


def summary(
    streams: Sequence[Stream],
    replays: Sequence[Replay],
    whole: Sequence[bool],
    tokens_of: Callable[[str], int],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Figures with their intervals; answers to one prompt are drawn together."""
    pairs = list(zip(streams, replays, strict=True))

    def column(values: Sequence[float]) -> Floats:
        return np.array(values, float)

    harmful = column([bool(item.example.unsafe) for item, _ in pairs])
    located = column([item.first_harmful is not None for item, _ in pairs])
    released = column([has_released_harm(item, one) for item, one in pairs])
    in_time = column([is_in_time(item, one) for item, one in pairs])
    stopped = column([one.is_stopped for one in replays])
    cut = column([one.fate == "cut" for one in replays])
    at_once = column(whole)
    tokens = column([tokens_of(item.example.text[: one.come]) for item, one in pairs]) / 1000
    judgements = column([one.judgements for one in replays])
    judged_tokens = column([one.judged_tokens for one in replays])
    held = column([sum(one.held) for one in replays])
    releases = column([len(one.held) for one in replays])
    first = column([one.held[0] if one.held else 0 for one in replays])
    begun = column([bool(one.held) for one in replays])

    def figures(weights: Floats) -> Figures:
        def share(what: Floats, of: Floats) -> Floats:
            return ratio(weights @ (what * of), weights @ of)

        harmless = 1 - harmful
        return {
            ("located", "harm_released"): share(released, located),
            ("located", "caught_in_time"): share(in_time, located),
            ("located", "never_caught"): share(1 - stopped, located),
            ("located", "caught_whole"): share(at_once, located),
            ("harmful", "harm_released_at_most"): share(released, harmful),
            ("harmful", "caught_in_time_at_least"): share(in_time, harmful),
            ("harmful", "never_caught"): share(1 - stopped, harmful),
            ("harmful", "regenerated"): share(stopped - cut, harmful),
            ("harmful", "cut"): share(cut, harmful),
            ("harmful", "caught_whole"): share(at_once, harmful),
            ("harmless", "stopped"): share(stopped, harmless),
            ("harmless", "regenerated"): share(stopped - cut, harmless),
            ("harmless", "cut"): share(cut, harmless),
            ("harmless", "flagged_whole"): share(at_once, harmless),
            ("cost", "judgements_per_1000_tokens"): ratio(weights @ judgements, weights @ tokens),
            ("cost", "judged_per_1000_tokens"): ratio(weights @ judged_tokens, weights @ tokens),
            ("cost", "held_characters"): ratio(weights @ held, weights @ releases),
            ("cost", "first_release_characters"): ratio(weights @ first, weights @ begun),
        }

    counts: Counts = {
        ("located", "n"): int(located.sum()),
        ("harmful", "n"): int(harmful.sum()),
        ("harmless", "n"): int((1 - harmful).sum()),
        ("cost", "n"): len(pairs),
    }
    clusters = [normal(item.example.prompt) for item in streams]
    return measured(figures, clusters, counts, seed=seed)[0]


_TITLES: Final = {
    "located": "harmful, where harm begins known",
    "harmful": "harmful, all",
    "harmless": "harmless",
    "cost": "all",
}
_LABELS: Final = {
    "harm_released": "a harmful sentence was released",
    "harm_released_at_most": "a harmful sentence was released, at most",
    "caught_in_time": f"caught within {GRACE} sentences of the first harmful one",
    "caught_in_time_at_least": f"caught within {GRACE} sentences of the first, at least",
    "never_caught": "never caught",
    "regenerated": "regenerated before any release",
    "cut": "cut",
    "stopped": "cut or regenerated",
    "caught_whole": "flagged when judged whole",
    "flagged_whole": "flagged when judged whole",
    "judgements_per_1000_tokens": "judgements per 1,000 answer tokens",
    "judged_per_1000_tokens": "judged tokens per 1,000 answer tokens",
    "held_characters": "characters held at a release",
    "first_release_characters": "characters held at the first release",
}


def as_markdown(figures: dict[str, Any]) -> str:
    """A table of the figures, shares as percent."""
    lines = ["| answers | figure | value | 95% interval |", "|---|---|---|---|"]
    for group, values in figures.items():
        unit = "{:.0f}" if group == "cost" else "{:.1%}"
        for name, bounds in values["intervals"].items():
            value = "–" if values[name] is None else unit.format(values[name])
            span = "–" if bounds is None else " to ".join(map(unit.format, bounds))
            cells = (f"{_TITLES[group]} ({values['n']})", _LABELS[name], value, span)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
