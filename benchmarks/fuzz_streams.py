"""Random streams through the gateway, in process: what reaches a client was cleared before.

    .venv/bin/python -m benchmarks.fuzz_streams [--streams N] [--seed N] [--mode hold|buffer]

Each stream has a seed of its own. It draws a dialect, a policy, what the upstream says in each
attempt (``random_streams``), how its bytes are cut, what goes wrong with it, how long the guard
takes and what it flags; ``--seed N --streams 1`` draws the same again. Time is virtual
(``fuzz_world``): what waits for a minute takes none, and what waits for ever is found at once.
There are no sockets.

Of each stream it is checked (``fuzz_client``) that
1. each character that is sent had been cleared by the guard before, in the order of its track;
2. no word that the policy stops is sent, nor spelled over several events or in escapes;
3. the dialect's own parser reads what was sent as complete, with one end, or it ends in an error;
4. where nothing was flagged and nothing failed, the events are the upstream's, in their order;
5. it ends: within so many turns of the loop, and leaves no task and no call of the upstream.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, Literal, cast

from prometheus_client import CollectorRegistry
from rich.table import Table

from benchmarks import measure
from benchmarks.fuzz_client import Client
from benchmarks.fuzz_world import (
    GUARD_SECONDS,
    MarkerGuard,
    ScriptedUpstream,
    Violation,
    VirtualLoop,
    pause,
)
from benchmarks.random_streams import Said
from benchmarks.random_texts import MINOR, SEVERE
from models.taxonomy import Severity
from service.caller import Caller
from service.chat import ChatDialect
from service.completions import CompletionsDialect
from service.errors import SluicegateError
from service.exchange import Dialect
from service.gateway import Gateway
from service.judgement import FieldJudge
from service.kept_texts import KeptTexts
from service.ledger import Bookkeeper
from service.messages import MessagesDialect
from service.metrics import Metrics
from service.policy import Action, Policy, Regenerate, Rule, Stream
from service.records import Record, Recorder
from service.replies import Incoming
from service.responses import ResponsesDialect
from service.routing import Route, Upstreams
from service.tracing import Tracer
from service.verdict_cache import VerdictCache

Mode = Literal["hold", "buffer"]
MODES: Final[tuple[Mode, ...]] = ("hold", "buffer")
DIALECTS: Final[tuple[Dialect, ...]] = (
    ChatDialect(), CompletionsDialect(), MessagesDialect(), ResponsesDialect(),
)  # fmt: skip
_RULES: Final = (
    Rule(direction="prompt", severity=Severity.MODERATE, action=Action.BLOCK),
    Rule(direction="response", severity=Severity.MODERATE, action=Action.BLOCK),
    Rule(direction="response", severity=Severity.MINOR, action=Action.ANNOTATE),
    Rule(action=Action.ALLOW),
)


# --- One stream ---------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Outcome:
    """How a stream went; ``sent`` counts characters."""

    dialect: str
    ending: str
    sent: int


class _NoRecorder:
    async def write(self, _: Sequence[Record]) -> None:
        return


@cache
def _policy(mode: Mode, speculative: bool, rounds: int, is_lenient: bool) -> Policy:
    policy = Policy(
        stream=Stream(mode=mode, speculative=speculative), regenerate=Regenerate(rounds=rounds)
    )
    return policy.model_copy(update={"rules": _RULES}) if is_lenient else policy


@cache
def _metrics() -> Metrics:
    return Metrics(CollectorRegistry())


def run_one(loop: VirtualLoop, seed: int, mode: Mode | None = None) -> Outcome:
    """Runs the stream of a seed. Raises ``Violation``."""
    draw = random.Random(seed)  # noqa: S311 - it guards no secret
    drawn = draw.choice(MODES)
    loop.begin()
    return loop.run_until_complete(_run(draw, mode or drawn))


def _asked(dialect: Dialect, draw: random.Random, prompt: str) -> dict[str, Any]:
    body: dict[str, Any] = {"model": "m", "stream": True}
    turn = {"role": "user", "content": prompt}
    count = draw.choice((1, 1, 2, 3))
    match dialect.name:
        case "chat":
            body |= {"messages": [turn], "n": count}
        case "completions" if draw.random() < 0.3:
            body |= {"prompt": [f"{prompt} {number}" for number in range(count)]}
        case "completions":
            body |= {"prompt": prompt, "n": count}
        case "messages":
            body |= {"messages": [turn], "max_tokens": 99}
        case "responses":
            body |= {"input": prompt}
    if dialect.name in ("chat", "completions") and draw.random() < 0.5:
        body["stream_options"] = {"include_usage": True}
    return body


async def _run(draw: random.Random, mode: Mode) -> Outcome:
    dialect = draw.choice(DIALECTS)
    is_lenient = draw.random() < 0.3
    policy = _policy(mode, draw.random() < 0.7, draw.choice((0, 1, 2)), is_lenient)
    stops = (SEVERE,) if is_lenient else (SEVERE, MINOR)
    guard = MarkerGuard(draw, stops)
    upstream = ScriptedUpstream(dialect, draw)
    judge = FieldJudge(
        cast(VerdictCache, guard), lambda _: b"", deadline=GUARD_SECONDS, most_fields=1000
    )
    # The drawn policies keep no text, so that there is no need of a place for it.
    texts = cast(KeptTexts, None)
    keeper = Bookkeeper(_metrics(), cast(Recorder, _NoRecorder()), "fuzz", Tracer(), texts)
    upstreams = Upstreams([cast(Route, upstream)])
    load = draw.choice((1.0, 1.0, 3.0))
    gateway = Gateway(judge, upstreams, keeper, most_streams=9, load=lambda: load)
    is_bad = draw.random() < 0.05
    body = _asked(dialect, draw, f"a question {SEVERE}" if is_bad else "a question")
    raw = json.dumps(body).encode()
    incoming = Incoming("id1", dialect.path, raw, body, {}, Caller(policy))
    leaves_after = draw.randrange(6) if draw.random() < 0.04 else None
    client = Client(dialect, upstream, guard, policy.refusal.text)
    ending = ""
    try:
        reply = await gateway.handle(dialect, incoming)
        if reply.status != 200:
            ending = "the upstream's status"
        elif reply.stream is None:
            client.take(reply.body)
        else:
            async with aclosing(cast(Any, reply.stream)) as pieces:
                async for piece in pieces:
                    client.take(piece)
                    if leaves_after == 0:
                        ending = "the client left"
                        break
                    leaves_after = leaves_after - 1 if leaves_after else None
                    await pause(draw)
    except SluicegateError as error:
        ending = "an error's status"
        client.told = error.message
    client.finish(stops)
    for _ in range(3):
        # A generator that an error left behind is closed by the loop, in a task of its own.
        await asyncio.sleep(0)
    left = len(asyncio.all_tasks()) - 1
    if left or upstream.open:
        raise Violation(f"{left} tasks and {upstream.open} calls of the upstream are left")
    ending = ending or _ending(dialect, body, client, upstream)
    _check_ending(ending, client, upstream, guard, is_bad, policy.refusal.text)
    return Outcome(dialect.name, ending, client.sent)


def _ending(
    dialect: Dialect, body: Mapping[str, Any], client: Client, upstream: ScriptedUpstream
) -> str:
    """How what was sent ends, which the dialect's own parser has to read."""
    name, ends, said = dialect.name, client.ends, client.said
    is_chunked = name in ("chat", "completions")
    if ends["error"]:
        if is_chunked:
            is_last = ends["done"] == 1 and said[-1][1] == "[DONE]" and '"error"' in said[-2][1]
        else:
            is_last = said[-1][0] == "error" and not ends["last"]
        if ends["error"] != 1 or not is_last:
            raise Violation(f"an error is not the one end of the stream: {dict(ends)}")
        return "an error"
    most_done = 1 if is_chunked or ends["done"] else 0
    if ends["done"] != most_done or ends["last"] != (0 if is_chunked else 1):
        raise Violation(f"the stream has not one end: {dict(ends)}")
    exchange = dialect.parse(body)
    data = [one for _, one in said]
    try:
        answer = dialect.parse_stream(exchange, data)
    except SluicegateError as error:
        raise Violation(f"what was sent cannot be read: {error.message}") from error
    if len(answer.choices) != exchange.choices:
        raise Violation(f"{len(answer.choices)} choices of {exchange.choices} were sent")
    if is_chunked and any(ends[f"finish {n}"] != 1 for n in range(exchange.choices)):
        raise Violation(f"not each choice has one end: {dict(ends)}")
    if ends["cut"]:
        return "cut"
    return "regenerated" if len(upstream.scripts) > 1 else "whole"


def _check_ending(
    ending: str,
    client: Client,
    upstream: ScriptedUpstream,
    guard: MarkerGuard,
    is_bad: bool,
    refusal: str,
) -> None:
    """Whether a stream may have ended so."""
    first = upstream.scripts[0] if upstream.scripts else None
    has_fault = first is not None and bool(first.fault)
    is_clean = not (guard.has_flagged or guard.has_failed or is_bad)
    if ending in ("an error", "an error's status") and not (has_fault or guard.has_failed):
        raise Violation(f"it ended in an error, and nothing had failed: {client.told}")
    if ending in ("the client left", "the upstream's status"):
        return
    if is_bad and any(not refusal.startswith(got) for got in client.got.values()):
        raise Violation("the prompt was blocked, and yet it was answered")
    if is_clean and has_fault and not ending.startswith("an error"):
        raise Violation(f"the upstream's fault ({first and first.fault}) was not told")
    if is_clean and not has_fault:
        assert first is not None
        # Behind message_stop or response.completed, a [DONE] of the upstream's says nothing, and
        # these dialects know none: the gateway may pass it, or end the stream without it.
        passed = ("ping",) if first.said[0][0] is None else ("ping", None)
        sent = [one for one in client.said if one[0] not in passed]
        told = [one for one in first.said if one[0] not in passed]
        if _by_choice(sent) != _by_choice(told):
            raise Violation("nothing was wrong, and yet the events are not the upstream's")


def _by_choice(said: Sequence[Said]) -> dict[int, list[Said]]:
    """The events that speak of each choice, in their order; under -1 those that speak of none."""
    found: dict[int, list[Said]] = {}
    for one in said:
        value = json.loads(one[1]) if one[1].startswith("{") else {}
        for choice in {item["index"] for item in value.get("choices", ())} or {-1}:
            found.setdefault(choice, []).append(one)
    return found


# --- Many ---------------------------------------------------------------------------------------
@dataclass(slots=True)
class Tally:
    """What many streams came to."""

    streams: int = 0
    endings: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By dialect and ending."""
    sent: int = 0
    early: int = 0
    """Characters that were sent before their verdict."""
    violations: list[str] = field(default_factory=list)


def run_many(seeds: Sequence[int], mode: Mode | None = None, most_violations: int = 1) -> Tally:
    """Runs the streams of these seeds, until so many were not as they must be."""
    tally = Tally()
    loop = VirtualLoop()
    for seed in seeds:
        tally.streams += 1
        try:
            outcome = run_one(loop, seed, mode)
        except Exception as error:  # Whatever is raised is a finding.
            if isinstance(error, Violation):
                tally.early += error.early
            tally.violations.append(f"seed {seed}: {type(error).__name__}: {error}")
            if len(tally.violations) >= most_violations:
                break
            # Tasks of the old one may be left.
            loop.end()
            loop = VirtualLoop()
        else:
            tally.endings[outcome.dialect, outcome.ending] += 1
            tally.sent += outcome.sent
    loop.end()
    return tally


def main() -> None:
    """Runs them and reports."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first; each next has the next")
    parser.add_argument("--mode", choices=MODES, help="drawn for each stream if not given")
    parser.add_argument("--violations", type=int, default=10, help="after so many it ends")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    started, busy = time.perf_counter(), time.process_time()
    seeds = range(options.seed, options.seed + options.streams)
    tally = run_many(seeds, options.mode, options.violations)
    _report(tally, time.perf_counter() - started, time.process_time() - busy, options.json)
    sys.exit(1 if tally.violations else 0)


def _report(tally: Tally, seconds: float, cpu: float, as_json: bool) -> None:
    names = [dialect.name for dialect in DIALECTS]
    table = Table("ending", *names, title=f"{tally.streams:,} random streams")
    for ending in sorted({ending for _, ending in tally.endings}):
        table.add_row(ending, *(f"{tally.endings[name, ending]:,}" for name in names))
    totals = Table("", "", title="What was sent")
    totals.add_row("characters sent", f"{tally.sent:,}")
    met = measure.goal(tally.early, 0, at_most=True)
    totals.add_row("released before their verdict", f"{tally.early:,}; goal {met}")
    totals.add_row("violations", str(len(tally.violations)))
    rate = f"{tally.streams / cpu:.0f} streams/s"
    totals.add_row("seconds", f"{seconds:.1f}, of CPU {cpu:.1f} ({rate})")
    figures = {
        "streams": {f"{name}: {ending}": n for (name, ending), n in tally.endings.items()},
        "characters_sent": tally.sent,
        "released_before_verdict": tally.early,
        "violations": tally.violations,
        "seconds": seconds,
        "cpu_seconds": cpu,
    }
    measure.report("fuzz_streams", [table, totals], figures, as_json)
    for violation in tally.violations:
        print(violation, file=sys.stderr)


if __name__ == "__main__":
    main()
