"""What guarding a chat adds with the real guard, against the guard's own two judgements.

    .venv/bin/python -m benchmarks.added [--guard DIR] [--json]

A prompt and an answer of 64 tokens each, nothing flagged, one connection, one core for the service.
The fake upstream answers at once, so that all the time is the proxy's. Beside it, in a process on
the same core, the guard judges the same prompt and then the same answer in its context. Every
prompt is another. The second pair of rows has a system prompt and two turns before each prompt,
which were judged before: what is judged anew is the prompt in that context, the user's turns as one
text, and the answer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, cast

import uvloop
from rich.table import Table

from benchmarks import measure
from benchmarks.moderation import texts_of
from models.checkpoint import DEFAULT_GUARD
from models.guard import judge
from models.inputs import GuardInput, Speaker, Turn
from models.text_guard import TextGuard

TOKENS: Final = 64
GOAL: Final = 1.3
_PROMPTS: Final = 400
_BEFORE: Final = (
    {"role": "system", "content": "You are a helpful assistant. Answer briefly."},
    {"role": "user", "content": "Which plants grow on a balcony without sun?"},
    {"role": "assistant", "content": "Ferns, hostas and ivy do well there."},
)
_CONTEXT: Final = tuple(Turn(cast(Speaker, turn["role"]), turn["content"]) for turn in _BEFORE)


def main() -> None:
    """Measures and reports; with ``--own``, measures the guard alone and prints milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--guard", type=Path, default=DEFAULT_GUARD)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one round")
    parser.add_argument("--own", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    guard = TextGuard(options.guard, threads=1)
    prompts, answer = _texts(guard)
    if options.own:
        print(json.dumps(_own(guard, prompts, answer, options.seconds)))
        return
    measure.need_two_cores()
    with tempfile.TemporaryDirectory(prefix="sg-bench-") as directory, ExitStack() as stack:
        rounds = uvloop.run(_measure(stack, Path(directory), options, prompts, answer))
    _report(rounds, options.json)


def _texts(guard: TextGuard) -> tuple[list[str], str]:
    """Prompts, all different, and an answer, of about ``TOKENS`` tokens each; none is flagged."""
    answer, *_ = texts_of(guard, TOKENS, 1)
    prompts = [f"{number}. {text}" for number, text in enumerate(texts_of(guard, TOKENS, _PROMPTS))]
    return prompts, answer


def _own(guard: TextGuard, prompts: list[str], answer: str, seconds: float) -> dict[str, float]:
    """Median milliseconds of judging a prompt and then its answer: alone, and after ``_BEFORE``."""
    taken: dict[str, list[float]] = {"alone": [], "later": []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        prompt = prompts[len(taken["alone"]) % len(prompts)]
        for name, before in (("alone", ()), ("later", _CONTEXT)):
            joint = [GuardInput("prompt", f"{_BEFORE[1]['content']}\n{prompt}")] if before else []
            started = time.perf_counter()
            judge(guard, [GuardInput("prompt", prompt, before), *joint])
            judge(guard, [GuardInput("response", answer, (*before, Turn("user", prompt)))])
            taken[name].append((time.perf_counter() - started) * 1e3)
    return {name: measure.median(each) for name, each in taken.items()}


async def _measure(
    stack: ExitStack,
    directory: Path,
    options: argparse.Namespace,
    prompts: list[str],
    answer: str,
) -> dict[str, list[float]]:
    upstream, log = measure.free_port(), directory / "upstream.log"
    command: list[str | int] = [
        *(sys.executable, "-m", "tests.fake_upstream", "--port", upstream, "--text", answer)
    ]
    process = stack.enter_context(measure.started(command, log, core=measure.LOAD_CORE))
    await measure.answers(process, upstream, "/v1/models", log)
    port, log = measure.free_port(), directory / "sluicegate.log"
    arguments: list[str | Path | int] = [
        *(sys.executable, "-m", "sluicegate", "serve", "--port", port),
        *("--guard", options.guard.resolve(), "--data-directory", directory / "data"),
        *("--upstream", f"http://127.0.0.1:{upstream}"),
    ]
    # No verdict is remembered from one round to the next, but for what every request holds.
    few = {"SLUICEGATE_CACHED_VERDICTS": "200"}
    process = stack.enter_context(
        measure.started(arguments, log, core=measure.SERVICE_CORE, environment=few)
    )
    await measure.answers(process, port, "/health/ready", log)
    alone = [_request([{"role": "user", "content": prompt}]) for prompt in prompts]
    later = [_request([*_BEFORE, {"role": "user", "content": prompt}]) for prompt in prompts]
    names = ("own alone", "own later", "alone", "later")
    rounds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name, own in _in_a_process(options).items():
            rounds[f"own {name}"].append(own)
        for name, requests in (("alone", alone), ("later", later)):
            proxied = await measure.load(port, requests, 1, options.seconds)
            direct = await measure.load(upstream, requests, 1, 0.5)
            added = (proxied.quantile(0.5) - direct.quantile(0.5)) * 1e3
            rounds[name].append(added)
    return rounds


def _in_a_process(options: argparse.Namespace) -> dict[str, float]:
    command = [
        *("taskset", "-c", str(measure.SERVICE_CORE), sys.executable, "-m", "benchmarks.added"),
        *("--own", "--guard", str(options.guard.resolve()), "--seconds", str(options.seconds)),
    ]
    done = subprocess.run(  # noqa: S603 - runs this very script, on the service's core
        command, cwd=measure.ROOT, capture_output=True, check=True
    )
    own: dict[str, float] = json.loads(done.stdout)
    return own


def _request(messages: list[dict[str, str]]) -> bytes:
    return measure.request("/v1/chat/completions", {"model": "m", "messages": messages})


def _report(rounds: dict[str, list[float]], as_json: bool) -> None:
    table = Table("", "the guard alone, ms", "added, ms", "ratio", "goal", title="Added at p50")
    figures: dict[str, Any] = {}
    for name, title in (("alone", "a prompt and its answer"), ("later", "with turns before them")):
        own, added = measure.median(rounds[f"own {name}"]), measure.median(rounds[name])
        figures[name] = {"own_milliseconds": own, "added_milliseconds": added, "ratio": added / own}
        met = measure.goal(added / own, GOAL, at_most=True)
        table.add_row(title, f"{own:.2f}", f"{added:.2f}", f"{added / own:.2f}", met)
    measure.report("added", [table], figures, as_json)


if __name__ == "__main__":
    main()
