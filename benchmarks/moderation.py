"""Moderation over HTTP, texts of 64 tokens, 16 connections, one core for the service.

    .venv/bin/python -m benchmarks.moderation [--guard DIR] [--json]

Three in interleaved rounds of one run: Sluicegate; a plain FastAPI route that calls a transformers
pipeline on the same encoder (float32 torch, one thread); and the bare ONNX session of the same
guard on the same windows, 16 at a time. Each has the service's core for itself, in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.table import Table

from benchmarks import measure
from models.checkpoint import DEFAULT_GUARD, TOKENIZER, Checkpoint
from models.inputs import GuardInput
from models.text_guard import TextGuard

OVER_PIPELINE: Final = 4.5
OF_BARE: Final = 0.75
TOKENS: Final = 64
BATCH: Final = 16
_TEXT: Final = """the of and to in is you that it he was for on are as with his they at be this
    have from or one had by word but not what all were we when your can said there use an each
    which she do how their if will up other about out many then them these so some her would make
    like him into time has look two more write go see number no way could people my than first
    water been call who oil its now find long down day did get come made may part"""


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--guard", type=Path, default=DEFAULT_GUARD)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one round")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve-pipeline", nargs=2, metavar=("DIR", "PORT"), help="internal")
    parser.add_argument("--bare", action="store_true", help="internal")
    options = parser.parse_args()
    if options.serve_pipeline:
        serve_pipeline(Path(options.serve_pipeline[0]), int(options.serve_pipeline[1]))
    elif options.bare:
        print(bare(options.guard, options.seconds))
    else:
        measure.need_two_cores()
        asyncio.run(compare(options))


async def compare(options: argparse.Namespace) -> None:
    """Runs the three in turn and prints the table."""
    texts = texts_of(TextGuard(options.guard), TOKENS, 64)
    bodies = [measure.request("/v1/moderations", {"input": text}) for text in texts]
    rates: dict[str, list[float]] = {"sluicegate": [], "pipeline": [], "bare session": []}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ports = {"sluicegate": measure.free_port(), "pipeline": measure.free_port()}
        log = directory / "log"
        arguments: dict[str, list[str | Path]] = {
            "sluicegate": [
                *(sys.executable, "-m", "sluicegate", "serve"),
                *("--port", str(ports["sluicegate"]), "--guard", options.guard.resolve()),
                *("--data-directory", directory / "data"),
            ],
            "pipeline": [
                *(sys.executable, "-m", "benchmarks.moderation", "--serve-pipeline"),
                *(save_classifier(options.guard, directory / "model"), str(ports["pipeline"])),
            ],
        }
        for name in ports:
            process = stack.enter_context(
                measure.started(arguments[name], log, core=measure.SERVICE_CORE)
            )
            path = "/health/ready" if name == "sluicegate" else "/docs"
            await measure.answers(process, ports[name], path, log)
            await measure.load(ports[name], bodies, BATCH, 1.0)
        for _ in range(options.rounds):
            for name, port in ports.items():
                load = await measure.load(port, bodies, BATCH, options.seconds)
                rates[name].append(load.rate)
            rates["bare session"].append(await bare_rate(options.guard, options.seconds))
    middle = {name: measure.median(values) for name, values in rates.items()}
    over = middle["sluicegate"] / middle["pipeline"]
    share = middle["sluicegate"] / middle["bare session"]
    table = Table("", "texts/s", "of each round", title="64-token texts, 16 at a time, one core")
    for name, values in rates.items():
        table.add_row(name, f"{middle[name]:.1f}", " ".join(f"{value:.1f}" for value in values))
    ratios = Table("ratio", "value", "goal")
    ratios.add_row("over the pipeline", f"{over:.2f}", measure.goal(over, OVER_PIPELINE))
    ratios.add_row("of the bare session", f"{share:.2f}", measure.goal(share, OF_BARE))
    figures = {"rates": rates, "over_pipeline": over, "of_bare_session": share}
    measure.report("moderation", [table, ratios], figures, options.json)


def texts_of(guard: TextGuard, tokens: int, count: int) -> list[str]:
    """Different texts that are windows of ``tokens`` tokens each, special tokens included."""
    generator = np.random.default_rng(1)
    vocabulary = _TEXT.split()
    texts = []
    for _ in range(count):
        words: list[str] = []
        while len(guard.prepare(GuardInput("prompt", " ".join(words))).windows[0]) < tokens:
            words.append(str(generator.choice(vocabulary)))
        texts.append(" ".join(words))
    return texts


def bare(guard: Path, seconds: float) -> float:
    """Texts a second of the session alone, on prepared windows."""
    loaded = TextGuard(guard, threads=1)
    windows = [
        loaded.prepare(GuardInput("prompt", text)).windows[0]
        for text in texts_of(loaded, TOKENS, 64)
    ]
    loaded.score(windows[:BATCH])
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        start = done % len(windows)
        loaded.score(windows[start : start + BATCH])
        done += BATCH
    return done / (time.perf_counter() - begun)


async def bare_rate(guard: Path, seconds: float) -> float:
    """``bare`` in a process on the service's core."""
    process = await asyncio.create_subprocess_exec(
        *("taskset", "-c", str(measure.SERVICE_CORE), sys.executable, "-m"),
        *("benchmarks.moderation", "--bare", "--guard", str(guard), "--seconds", str(seconds)),
        cwd=measure.ROOT,
        stdout=subprocess.PIPE,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60 + seconds)
    return float(output)


def save_classifier(guard: Path, directory: Path) -> Path:
    """The guard's encoder as transformers' own text classifier, with a head of random weights."""
    from transformers import (
        AutoConfig,
        AutoModelForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    from models import network

    loaded = network.load(guard)
    settings = dict(Checkpoint(guard).card.network)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings, num_labels=26)
    classifier = AutoModelForSequenceClassification.from_config(config)
    encoder = getattr(classifier, classifier.base_model_prefix)
    encoder.load_state_dict(loaded.encoder.state_dict(), strict=False)
    classifier.save_pretrained(directory)
    PreTrainedTokenizerFast(
        tokenizer_file=str(guard / TOKENIZER),
        pad_token="[PAD]",  # noqa: S106 - the tokenizer's padding symbol, no password
        model_max_length=512,
    ).save_pretrained(directory)
    return directory


def serve_pipeline(directory: Path, port: int) -> None:
    """What people write first: one route, one pipeline call a request."""
    import torch
    import uvicorn
    from fastapi import FastAPI
    from transformers import pipeline

    torch.set_num_threads(1)
    classify = pipeline("text-classification", model=str(directory), top_k=None)
    app = FastAPI()

    @app.post("/v1/moderations")
    def moderate(body: dict[str, str]) -> Any:
        return {"results": classify([body["input"]])}

    uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
