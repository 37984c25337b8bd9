"""Metrics: what Prometheus reads, and that no label can be chosen by a client."""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import pytest
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families

from models.taxonomy import CATEGORIES
from service.audit import Audit
from service.callers import Refusal
from service.event_index import EventIndex
from service.kept_texts import KeptTexts
from service.metrics import Metrics
from service.state import State
from tests.guards import BrokenGuard, WordGuard
from tests.service.conftest import Server, StartServer
from tests.service.test_policy import MINOR, NONE, SEVERE, verdict


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    """A server that has seen one of everything that needs no upstream."""
    made = start_server(guard=BrokenGuard())
    client = made.client()
    client.post("/v1/moderations", json={"input": ["w1", "minor-drugs", "severe-violence"]})
    client.post("/v1/guard", json={"prompt": "w1", "response": "moderate-cybercrime"})
    client.post("/v1/moderations", json={"input": "poison"})
    client.post("/v1/moderations", json={"input": 3})
    client.post("/v1/chat/completions", json={"model": "m", "messages": []})
    client.get("/nowhere")
    return made


@pytest.fixture
def families(server: Server) -> dict[str, Metric]:
    """The exposition, as Prometheus' own parser reads it."""
    return {family.name: family for family in text_string_to_metric_families(server.metrics())}


def ours(families: dict[str, Metric]) -> Iterator[Metric]:
    return (family for name, family in families.items() if not name.endswith("_created"))


def test_the_fixed_names_are_there(families: dict[str, Metric]) -> None:
    labels = {
        name: {frozenset(sample.labels) - {"le"} for sample in family.samples}
        for name, family in families.items()
    }
    assert labels["sluicegate_outcomes"] == {frozenset({"direction", "outcome"})}
    assert labels["sluicegate_flagged"] == {
        frozenset({"direction", "category", "severity", "outcome"})
    }
    assert labels["sluicegate_guard_seconds"] == {frozenset({"direction"})}
    for name in (
        "sluicegate_rounds",
        "sluicegate_wasted_tokens",
        "sluicegate_released_before_verdict_characters",
        "sluicegate_bypasses",
        "sluicegate_upstream_seconds",
        "sluicegate_overhead_seconds",
    ):
        assert name in families


def test_they_follow_prometheus_conventions(families: dict[str, Metric]) -> None:
    for family in ours(families):
        assert family.name.startswith("sluicegate_")
        assert family.documentation.endswith(".")
        assert family.type in ("counter", "gauge", "histogram")
        names = {sample.name for sample in family.samples}
        if family.type == "counter":
            assert all(name.endswith(("_total", "_created")) for name in names)
        if family.type == "histogram":
            assert family.name.endswith(("_seconds", "_rows"))
        assert not any(unit in family.name for unit in ("milliseconds", "_ms", "_kb"))


def test_every_label_is_one_of_a_fixed_set(families: dict[str, Metric]) -> None:
    allowed = {
        "direction": {"prompt", "response"},
        "outcome": {
            *("allowed", "annotated", "regenerated", "blocked", "bypassed", "error"),
            *("confirmed", "overturned"),
        },
        "category": {*CATEGORIES, "uncategorised"},
        "severity": {"minor", "moderate", "severe"},
        "route": {"/v1/moderations", "/v1/guard", "/v1/chat/completions"},
        "status": {"200", "400", "503"},
        "counted": {"shared", "local"},
        "result": {
            *("stored", "spooled", "duplicates", "unreadable", "lost"),
            *("hit", "miss", "error"),
            *("rescued", "refused", "exhausted"),
            *("added", "missed", "dropped"),
            *("kept", "indexed"),
        },
        "reason": {"guard_unavailable", "unscannable", "open_route", *get_args(Refusal)},
        "tier": {"local"},
        "version": {version("sluicegate")},
        "guard": {"words-1"},
        "policy": {"default@1"},
    }
    for family in ours(families):
        for sample in family.samples:
            for name, value in sample.labels.items():
                assert name == "le" or value in allowed[name], (sample.name, name)


def test_what_happened_is_counted(server: Server) -> None:
    assert server.sample("http_requests_total", route="/v1/moderations", status="200") == 1
    assert server.sample("http_requests_total", route="/v1/moderations", status="503") == 1
    assert server.sample("http_requests_total", route="/v1/moderations", status="400") == 1
    assert server.sample("outcomes_total", direction="prompt", outcome="annotated") == 1
    assert server.sample("outcomes_total", direction="prompt", outcome="allowed") == 1
    assert server.sample("outcomes_total", direction="prompt", outcome="error") == 1
    assert server.sample("outcomes_total", direction="response", outcome="annotated") == 1
    flagged = {"direction": "prompt", "outcome": "annotated"}
    assert server.sample("flagged_total", category="drugs", severity="minor", **flagged) == 1
    assert server.sample("flagged_total", category="violence", severity="severe", **flagged) == 1
    assert server.sample("guard_seconds_count", direction="prompt") == 2
    assert server.sample("guard_batch_rows_sum") == 4
    # The prompt of the native check had been moderated before.
    assert server.sample("cache_requests_total", tier="local", result="hit") == 1
    assert server.sample("overhead_seconds_count") == 3
    assert server.sample("guard_waiting_windows") == 0
    assert server.sample("state_up") == 1
    assert server.sample("records_total", result="stored") == 3
    assert server.sample("records_total", result="lost") == 0


def test_what_has_few_labels_is_shown_before_its_first_event(metrics: Metrics) -> None:
    shown = [
        (sample.name, *sample.labels.values(), sample.value)
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.labels and sample.name.endswith("_total")
    ]
    for reason in ("guard_unavailable", "unscannable", "open_route"):
        assert ("sluicegate_bypasses_total", reason, 0) in shown
    for result in ("rescued", "refused", "exhausted"):
        assert ("sluicegate_rounds_total", result, 0) in shown
    for reason in ("missing", "invalid", "rate"):
        assert ("sluicegate_refused_requests_total", reason, 0) in shown
    for direction in ("prompt", "response"):
        for outcome in ("allowed", "annotated", "regenerated", "blocked", "bypassed", "error"):
            assert ("sluicegate_outcomes_total", direction, outcome, 0) in shown
    # As many series as there are labels that clients can bring about, and no more.
    assert len(shown) == 3 + 3 + len(get_args(Refusal)) + 12


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


def flagged(metrics: Metrics, category: str, severity: str) -> float | None:
    labels = {"direction": "prompt", "outcome": "blocked"}
    labels |= {"category": category, "severity": severity}
    return metrics.registry.get_sample_value("sluicegate_flagged_total", labels)


def test_a_text_is_flagged_once_for_each_category_that_fired(metrics: Metrics) -> None:
    metrics.verdict("prompt", verdict(SEVERE, "drugs", "violence"), "blocked")
    assert flagged(metrics, "drugs", "severe") == flagged(metrics, "violence", "severe") == 1


def test_harm_outside_the_categories_is_counted_too(metrics: Metrics) -> None:
    metrics.verdict("prompt", verdict(MINOR), "blocked")
    assert flagged(metrics, "uncategorised", "minor") == 1


def test_a_safe_text_is_not_flagged(metrics: Metrics) -> None:
    metrics.verdict("prompt", verdict(NONE, "drugs"), "blocked")
    (family,) = (one for one in metrics.registry.collect() if one.name == "sluicegate_flagged")
    assert not family.samples


async def test_texts_that_are_missed_and_records_that_are_indexed_are_counted(
    metrics: Metrics, tmp_path: Path
) -> None:
    state = await State.open("redis://127.0.0.1:1", data_directory=tmp_path)
    try:
        texts, index = KeptTexts(state, Audit(state)), EventIndex(state)
        metrics.watch_shelf(texts, index)
        await texts.keep("1", "text", "full")
        index.counts.indexed = 3
    finally:
        await state.close()

    sample = metrics.registry.get_sample_value
    assert sample("sluicegate_kept_texts_total", {"result": "missed"}) == 1
    assert sample("sluicegate_indexed_records_total", {"result": "indexed"}) == 3


def test_two_services_in_one_process_count_apart() -> None:
    first, second = Metrics(CollectorRegistry()), Metrics(CollectorRegistry())
    first.wasted_tokens.inc()
    assert second.registry.get_sample_value("sluicegate_wasted_tokens_total") == 0


def test_the_guard_is_named(families: dict[str, Metric]) -> None:
    (build,) = families["sluicegate_build_info"].samples
    assert (build.labels["guard"], build.value) == (WordGuard.id, 1)
