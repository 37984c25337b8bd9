"""Latency: what is told; how long anything takes is not tested."""

from models.inputs import GuardInput
from tests.guards import WordGuard
from training.latency import BATCH, measure_latency


def test_the_figures_and_the_machine_are_told() -> None:
    guard = WordGuard()
    items = [GuardInput("prompt", "the weather")] * (BATCH + 1)
    found = measure_latency(guard, items, threads=3)
    assert found["n"] == BATCH + 1
    assert found["mean_characters"] == len("the weather")
    assert 0 < found["milliseconds_p50"] <= found["milliseconds_p95"]
    assert found["texts_per_second"] > 0
    assert found["intervals"].keys() == {"milliseconds_p50", "milliseconds_p95", "texts_per_second"}
    assert found["machine"]["threads"] == 3
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["processor"]
    # Each text alone, and then all in two batches.
    sizes = [len(batch) for batch in guard.batches]
    assert sizes[-2:] == [BATCH, 1]
    assert sizes[1:-2] == [1] * (BATCH + 1)
