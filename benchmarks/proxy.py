"""What a proxied chat costs: CPU time a request, ours against LiteLLM's proxy and nginx.

    .venv/bin/python -m benchmarks.proxy [--json]

All stand before the same fake upstream, which greets at once, and each has one core. Ours does all
that it does in service (extractor, gate, policy, records, metrics, private Valkey) with a guard
that answers at once. LiteLLM has a model name that it knows, a master key, its log at ERROR, no
database and no callbacks; nginx has one worker that keeps connections, where it is installed.
Rounds are interleaved, at concurrency 1 and 16; figures are medians. Every prompt is another, so
that no verdict was given before; the system prompt is the same.

CPU time is user and system time of a proxy's process tree, divided by its requests. The private
Valkey is counted apart, and the ratio is given both without and with it. Throughput and latency
are shown too, but on a busy machine they say more of the machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import uvloop
import yaml
from rich.table import Table

from benchmarks import measure
from benchmarks.measure import Load, median
from benchmarks.nginx import nginx

GOAL: Final = 40
"""LiteLLM's CPU time over ours, at the least."""
NGINX_GOAL: Final = 12
"""Ours over nginx's, at most."""
ADDED_GOAL: Final = 0.5
"""Milliseconds that ours adds to the upstream's p50 at one connection, at most."""
_PROMPTS: Final = 20_000
"""More than verdicts are remembered."""

_MODEL: Final = "gpt-4o-mini"
_KEY: Final = "sk-benchmark"
_STATE: Final = "valkey-server"
_DIRECT: Final = "the upstream itself"
_CONCURRENCIES: Final = (1, 16)


@dataclass(frozen=True, slots=True)
class Target:
    """A proxy that runs."""

    name: str
    port: int
    process_id: int

    def cpu(self) -> tuple[float, float]:
        """Seconds so far: of the proxy, and of its private Valkey."""
        members = measure.tree(self.process_id)
        state = sum(one.cpu_seconds for one in members if one.name == _STATE)
        return sum(one.cpu_seconds for one in members) - state, state


@dataclass(frozen=True, slots=True)
class Round:
    """One target under load; CPU time in microseconds a request."""

    load: Load
    proxy_cpu: float
    state_cpu: float


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one round")
    parser.add_argument(
        "--litellm",
        type=Path,
        default=measure.ROOT / ".venv-bench" / "bin" / "litellm",
        help="its command, which `make .venv-bench/.done` installs",
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not options.litellm.exists():
        sys.exit(f"{options.litellm} is missing: make .venv-bench/.done installs it")
    measure.need_two_cores()
    with tempfile.TemporaryDirectory(prefix="sg-bench-") as directory, ExitStack() as stack:
        rounds = uvloop.run(
            _measure(stack, Path(directory), options.litellm, options.rounds, options.seconds)
        )
    _report(rounds, options.json)


async def _measure(
    stack: ExitStack, directory: Path, litellm: Path, rounds: int, seconds: float
) -> dict[tuple[str, int], list[Round]]:
    upstream = measure.free_port()
    log = directory / "upstream.log"
    process = stack.enter_context(
        measure.started(
            [sys.executable, "-m", "tests.fake_upstream", "--port", upstream, "--model", _MODEL],
            log,
            core=measure.LOAD_CORE,
        )
    )
    await measure.answers(process, upstream, "/v1/models", log)
    url = f"http://127.0.0.1:{upstream}"
    behind_nginx = await nginx(stack, directory, upstream)
    targets = [
        await _sluicegate(stack, directory, url),
        await _litellm(stack, directory, litellm, url),
        *([Target("nginx", *behind_nginx)] if behind_nginx else []),
        Target(_DIRECT, upstream, process.pid),
    ]
    requests = [_request(number) for number in range(_PROMPTS)]
    for target in targets:
        await measure.load(target.port, requests, 16, 1.5)
    results: dict[tuple[str, int], list[Round]] = {}
    for _ in range(rounds):
        for concurrency in _CONCURRENCIES:
            for target in targets:
                before = target.cpu()
                load = await measure.load(target.port, requests, concurrency, seconds)
                proxy, state = (
                    (after - earlier) / load.requests * 1e6
                    for after, earlier in zip(target.cpu(), before, strict=True)
                )
                results.setdefault((target.name, concurrency), []).append(Round(load, proxy, state))
    return results


async def _sluicegate(stack: ExitStack, directory: Path, upstream: str) -> Target:
    port, log = measure.free_port(), directory / "sluicegate.log"
    process = stack.enter_context(
        measure.started(
            [
                *(sys.executable, "-m", "benchmarks.instant", "--port", port),
                *("--upstream", upstream, "--data-directory", directory / "data"),
            ],
            log,
            core=measure.SERVICE_CORE,
        )
    )
    await measure.answers(process, port, "/health/ready", log)
    return Target("sluicegate", port, process.pid)


async def _litellm(stack: ExitStack, directory: Path, command: Path, upstream: str) -> Target:
    port, log = measure.free_port(), directory / "litellm.log"
    config = directory / "litellm.yaml"
    model = {"model": f"openai/{_MODEL}", "api_base": f"{upstream}/v1", "api_key": "none"}
    config.write_text(
        yaml.safe_dump(
            {
                "model_list": [{"model_name": _MODEL, "litellm_params": model}],
                "general_settings": {"master_key": _KEY},
            }
        )
    )
    process = stack.enter_context(
        measure.started(
            [command, "--config", config, "--host", "127.0.0.1", "--port", port],
            log,
            core=measure.SERVICE_CORE,
            # It would fetch its prices and report its use; neither concerns the measurement.
            environment={
                "LITELLM_LOG": "ERROR",
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                "LITELLM_TELEMETRY": "False",
            },
        )
    )
    await measure.answers(process, port, "/health/liveliness", log)
    return Target("litellm", port, process.pid)


def _request(number: int) -> bytes:
    """A chat of two turns as an OpenAI client sends it, about 700 bytes with its headers."""
    body = {
        "model": _MODEL,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant. Answer briefly."},
            {"role": "user", "content": f"Which {number} plants grow on a balcony without sun?"},
        ],
        "temperature": 0.7,
        "max_tokens": 128,
    }
    headers = {
        "accept": "application/json",
        "accept-encoding": "gzip, deflate",
        "authorization": f"Bearer {_KEY}",
        "user-agent": "OpenAI/Python 2.30.0",
        "x-stainless-lang": "python",
        "x-stainless-retry-count": "0",
    }
    return measure.request("/v1/chat/completions", body, headers)


def _report(rounds: Mapping[tuple[str, int], list[Round]], as_json: bool) -> None:
    figures = {key: _figures(measured) for key, measured in rounds.items()}
    table = Table(
        *("proxy", "concurrency", "CPU µs/request", "its range", "Valkey's µs"),
        *("requests/s", "p50 ms", "p99 ms"),
        title="A chat through a proxy on one core, before a fake upstream",
    )
    for (name, concurrency), row in figures.items():
        own = [one.proxy_cpu for one in rounds[name, concurrency]]
        table.add_row(
            *(name, str(concurrency), f"{row['cpu_microseconds']:.0f}"),
            *(f"{min(own):.0f}–{max(own):.0f}", f"{row['valkey_cpu_microseconds']:.0f}"),
            *(f"{row['requests_per_second']:.0f}", f"{row['p50_milliseconds']:.2f}"),
            f"{row['p99_milliseconds']:.2f}",
        )
    ratios = Table(
        *("concurrency", "LiteLLM / ours", "goal", "with Valkey's", "ours / nginx", "goal"),
        *("added p50 ms", "goal"),
        title="Ratios of CPU, and what ours adds to the upstream's p50",
    )
    shown = []
    for concurrency in _CONCURRENCIES:
        ours, theirs = figures["sluicegate", concurrency], figures["litellm", concurrency]
        cpu = ours["cpu_microseconds"]
        alone = theirs["cpu_microseconds"] / cpu
        whole = theirs["cpu_microseconds"] / (cpu + ours["valkey_cpu_microseconds"])
        direct = figures[_DIRECT, concurrency]
        added = ours["p50_milliseconds"] - direct["p50_milliseconds"]
        row = {"concurrency": concurrency, "ratio": alone, "ratio_with_valkey": whole}
        row["added_p50_milliseconds"] = added
        cells = ["–", "–"]
        if nginx := figures.get(("nginx", concurrency)):
            over = cpu / nginx["cpu_microseconds"]
            row["over_nginx"] = over
            cells = [f"{over:.1f}", measure.goal(over, NGINX_GOAL, at_most=True)]
        shown.append(row)
        ratios.add_row(
            *(str(concurrency), f"{alone:.1f}", measure.goal(alone, GOAL), f"{whole:.1f}"),
            *(*cells, f"{added:.2f}"),
            measure.goal(added, ADDED_GOAL, at_most=True) if concurrency == 1 else "–",
        )
    rows = [
        {"proxy": name, "concurrency": concurrency, **row}
        for (name, concurrency), row in figures.items()
    ]
    measure.report("proxy", [table, ratios], {"rows": rows, "ratios": shown}, as_json)


def _figures(measured: Sequence[Round]) -> dict[str, float]:
    """Medians over rounds."""
    return {
        "cpu_microseconds": median([one.proxy_cpu for one in measured]),
        "valkey_cpu_microseconds": median([one.state_cpu for one in measured]),
        "requests_per_second": median([one.load.rate for one in measured]),
        "p50_milliseconds": median([one.load.quantile(0.5) * 1e3 for one in measured]),
        "p99_milliseconds": median([one.load.quantile(0.99) * 1e3 for one in measured]),
    }


if __name__ == "__main__":
    main()
