"""What guarding a chat adds with the real guard, against the guard's own two judgements.

    .venv/bin/python -m benchmarks.added [--guard DIR] [--json]

A prompt and an answer of 64 tokens each, nothing flagged, one connection, one core for the service.
The fake upstream answers at once, so that all the time is the proxy's. Beside it, in a process on
the same core, the guard judges the same prompt and then the same answer in its context. Every
prompt is another. The third row sends a system prompt and two earlier turns with each prompt, which
were judged before: they cost nothing but the user's turns as one text.
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
from typing import Any, Final

import uvloop
from rich.table import Table

from benchmarks import measure
from benchmarks.moderation import texts_of
from models.checkpoint import DEFAULT_GUARD
from models.guard import judge
from models.inputs import GuardInput, Turn
from models.text_guard import TextGuard

TOKENS: Final = 64
GOAL: Final = 1.3
_PROMPTS: Final = 400
_BEFORE: Final = (
    {"role": "system", "content": "You are a helpful assistant. Answer briefly."},
    {"role": "user", "content": "Which plants grow on a balcony without sun?"},
    {"role": "assistant", "content": "Ferns, hostas and ivy do well there."},
)


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


def _own(guard: TextGuard, prompts: list[str], answer: str, seconds: float) -> float:
    """Median milliseconds of judging a prompt and then the answer to it."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        prompt = prompts[len(taken) % len(prompts)]
        started = time.perf_counter()
        judge(guard, [GuardInput("prompt", prompt)])
        judge(guard, [GuardInput("response", answer, (Turn("user", prompt),))])
        taken.append((time.perf_counter() - started) * 1e3)
    return measure.median(taken)


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
    rounds: dict[str, list[float]] = {"own": [], "alone": [], "later": []}
    for _ in range(options.rounds):
        rounds["own"].append(_in_a_process(options))
        for name, requests in (("alone", alone), ("later", later)):
            proxied = await measure.load(port, requests, 1, options.seconds)
            direct = await measure.load(upstream, requests, 1, 0.5)
            added = (proxied.quantile(0.5) - direct.quantile(0.5)) * 1e3
            rounds[name].append(added)
    return rounds


def _in_a_process(options: argparse.Namespace) -> float:
    command = [
        *("taskset", "-c", str(measure.SERVICE_CORE), sys.executable, "-m", "benchmarks.added"),
        *("--own", "--guard", str(options.guard.resolve()), "--seconds", str(options.seconds)),
    ]
    done = subprocess.run(command, cwd=measure.ROOT, capture_output=True, check=True)  # noqa: S603
    return float(json.loads(done.stdout))


def _request(messages: list[dict[str, str]]) -> bytes:
    return measure.request("/v1/chat/completions", {"model": "m", "messages": messages})


def _report(rounds: dict[str, list[float]], as_json: bool) -> None:
    own = measure.median(rounds["own"])
    table = Table("", "ms", "over the guard's own", "goal", title="Added at p50, one connection")
    table.add_row("the guard's two judgements alone", f"{own:.2f}", "1.00", "–")
    figures: dict[str, Any] = {"own_milliseconds": own}
    for name, title in (("alone", "a prompt and its answer"), ("later", "with what came before")):
        added = measure.median(rounds[name])
        figures[f"{name}_milliseconds"] = added
        met = measure.goal(added / own, GOAL, at_most=True) if name == "alone" else "–"
        table.add_row(title, f"{added:.2f}", f"{added / own:.2f}", met)
    measure.report("added", [table], figures, as_json)


if __name__ == "__main__":
    main()
