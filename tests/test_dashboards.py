"""Dashboards and alerts: their files, then Prometheus' own tools and a service that has traffic.

``make test-prometheus`` runs what needs ``prometheus``, ``promtool`` and
``prometheus-alertmanager``, and fails where one of them is missing.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import yaml

from tests.word_service import OPEN_ROUTE

T = TypeVar("T")

ROOT = Path(__file__).parent.parent
DASHBOARDS = sorted((ROOT / "dashboards").glob("*.json"))
RULES = ROOT / "dashboards" / "rules.yml"
RULE_TESTS = sorted((ROOT / "dashboards").glob("*_test.yml"))
RUNBOOK = ROOT / "docs" / "runbook.md"
GRAFANA = ROOT / "tests" / "grafana"
UNKNOWN_KEY = f"sg-{'0' * 10}-{'0' * 43}"
"""Looks like a key of ours, and is none."""
VARIABLES = {
    "$__rate_interval": "10s",
    "$__range": "2m",
    "$against": "5s",
    "$job": ".*",
    "$instance": ".*",
}
"""What takes the place of a dashboard's variables, for a service that began just now."""
PATIENCE = 180.0
"""Seconds after which what does not come fails; a busy machine is slow."""

with_prometheus = pytest.mark.prometheus
"""Marks a test that runs Prometheus' own programs."""


@dataclass(frozen=True)
class Query:
    """One query of one panel, or of one rule."""

    place: str
    expr: str


def panels(file: Path) -> list[dict[str, Any]]:
    """The panels of a dashboard that show something."""
    board = json.loads(file.read_text("utf-8"))
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def panel_queries() -> list[Query]:
    """Every query of every panel, with values for the variables."""
    return [
        Query(f"{file.stem}: {panel['title']} {target['refId']}", _substituted(target["expr"]))
        for file in DASHBOARDS
        for panel in panels(file)
        for target in panel["targets"]
    ]


def _substituted(expr: str) -> str:
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    assert "$" not in expr, f"a variable is left in {expr}"
    return expr


@cache
def rules() -> list[dict[str, Any]]:
    return [
        rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    ]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


# --- The files by themselves -------------------------------------------------------------------
def promtool(*arguments: str) -> str:
    """What promtool prints; it must be content."""
    run = subprocess.run(
        ["promtool", *arguments], capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@with_prometheus
def test_promtool_accepts_the_rules() -> None:
    assert f"{len(rules())} rules found" in promtool("check", "rules", str(RULES))


@with_prometheus
@pytest.mark.parametrize("file", RULE_TESTS, ids=lambda file: file.stem)
def test_alerts_fire_when_they_should_and_only_then(file: Path) -> None:
    assert "SUCCESS" in promtool("test", "rules", str(file))


def test_each_alert_is_tested_to_fire_and_to_be_silent() -> None:
    fires: set[str] = set()
    silent: set[str] = set()
    for file in RULE_TESTS:
        for case in yaml.safe_load(file.read_text())["tests"]:
            firing = [
                {re.sub(r'.*"(.*)".*', r"\1", sample["labels"]) for sample in one["exp_samples"]}
                for one in case["promql_expr_test"]
            ]
            fires |= set().union(*firing)
            if set() in firing:
                silent |= {name for name in alerts() if name.startswith(case["name"].split()[0])}
    assert fires == silent == set(alerts())


@pytest.mark.parametrize("name", alerts())
def test_an_alert_says_how_grave_it_is_and_what_to_do(name: str) -> None:
    alert = alerts()[name]
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    notes = alert["annotations"]
    assert set(notes) == {"summary", "description", "runbook_url"}
    assert notes["runbook_url"] == f"docs/runbook.md#{name.lower()}"


def test_the_runbook_has_a_section_for_each_alert_and_no_other() -> None:
    sections = re.findall(r"^## (.+)$", RUNBOOK.read_text("utf-8"), re.MULTILINE)
    assert sorted(sections) == sorted(alerts())


def test_each_section_says_what_it_means_where_to_look_and_what_to_do() -> None:
    for section in RUNBOOK.read_text("utf-8").split("\n## ")[1:]:
        for word in ("**Means.**", "**Look.**", "**Do.**"):
            assert section.count(word) == 1, section.splitlines()[0]


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_a_dashboard_can_be_imported_anywhere(file: Path) -> None:
    board = json.loads(file.read_text("utf-8"))
    assert board["templating"]["list"][0]["name"] == "datasource"
    assert board["uid"] == f"sluicegate-{file.stem}"
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in panels(file):
        assert panel["type"] in ("stat", "timeseries", "table")
        assert panel["description"]
        for target in (panel, *panel["targets"]):
            assert target["datasource"]["uid"] == "${datasource}"


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_panels_do_not_overlap(file: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(file.read_text("utf-8"))["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


@with_prometheus
def test_dashboards_are_what_grafana_reads(tmp_path: Path) -> None:
    if shutil.which("node") is None or not (GRAFANA / "node_modules").is_dir():
        pytest.skip("no Node, or no schema in tests/grafana: make test-prometheus installs it")
    (tmp_path / "node_modules").symlink_to(GRAFANA / "node_modules")
    for file in DASHBOARDS:
        source = 'import type { Board } from "./board";\n'
        source += f"export const board: Board = {file.read_text('utf-8')};\n"
        (tmp_path / f"{file.stem}.ts").write_text(source, "utf-8")
    for name in ("board.ts", "tsconfig.json"):
        shutil.copy(GRAFANA / name, tmp_path)
    run = subprocess.run(
        ["node_modules/.bin/tsc", "-p", "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout


# --- Before a service that has traffic -----------------------------------------------------------
@dataclass
class Live:
    """A service with traffic, a Prometheus that scrapes it, and who is told of alerts."""

    url: str
    prometheus: httpx.Client
    told: list[dict[str, Any]] = field(default_factory=list)
    """Alerts that the webhook received."""

    def query(self, expr: str) -> list[Any]:
        """The samples of an instant query whose values are numbers."""
        answer = self.prometheus.get("/api/v1/query", params={"query": expr}).json()
        assert answer["status"] == "success", answer
        return [one for one in answer["data"]["result"] if one["value"][1] != "NaN"]


def eventually(ask: Callable[[], T]) -> T:
    """What ``ask`` gives once that is something; what it gives at last where it never is."""
    until = time.monotonic() + PATIENCE
    while not (given := ask()) and time.monotonic() < until:
        time.sleep(0.5)
    return given


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def process(log: Path, *command: str) -> Iterator[None]:
    """A program that runs meanwhile."""
    with log.open("wb") as file:
        running = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        try:
            yield
            assert running.poll() is None, log.read_text()[-2000:]
        finally:
            running.terminate()
            try:
                running.wait(60)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def send_everything(client: httpx.Client) -> None:
    """One request of each kind: safe, flagged, regenerated, blocked, streamed, bad, passed by,
    refused.
    """

    def chat(prompt: str, **more: Any) -> None:
        messages = [{"role": "user", "content": prompt}]
        client.post("/v1/chat/completions", json={"model": "m", "messages": messages, **more})

    chat("a fine day")
    chat("a fine day", stream=True)
    chat("again")
    chat("hopeless")
    chat("severe-violence here")
    chat("moderate-cybercrime here", stream=True)
    chat("minor-drugs here")
    client.post("/v1/moderations", json={"input": ["w1", "severe-violence minor-drugs"]})
    # A text that was never seen, so that not all verdicts are remembered.
    client.post("/v1/moderations", json={"input": f"w1 {time.monotonic_ns()}"})
    client.post("/v1/moderations", json={"input": 3})
    client.post("/v1/chat/completions", content=b"{")
    client.get(OPEN_ROUTE)
    client.get("/v1/models", headers={"x-api-key": UNKNOWN_KEY})


@contextmanager
def traffic(url: str) -> Iterator[None]:
    """Sends everything again and again meanwhile."""
    stopping = threading.Event()

    def run() -> None:
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            while not stopping.wait(0.2):
                send_everything(client)

    thread = threading.Thread(target=run, name="traffic")
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


@contextmanager
def webhook(told: list[dict[str, Any]]) -> Iterator[str]:
    """Where Alertmanager sends what it has to tell."""

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            told.extend(json.loads(body)["alerts"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever, name="webhook")
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def written(file: Path, value: dict[str, Any]) -> str:
    file.write_text(yaml.safe_dump(value), "utf-8")
    return str(file)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    place = tmp_path_factory.mktemp("live")
    ports = {name: free_port() for name in ("service", "prometheus", "alertmanager")}
    urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    with ExitStack() as stack:
        client = httpx.Client(base_url=urls["prometheus"], timeout=60, trust_env=False)
        made = Live(urls["service"], stack.enter_context(client))
        receiver = {"name": "all", "webhook_configs": [{"url": ""}]}
        receiver["webhook_configs"] = [{"url": stack.enter_context(webhook(made.told))}]
        route = {"receiver": "all", "group_wait": "1s", "group_by": ["..."]}
        alertmanager = written(
            place / "alertmanager.yml", {"route": route, "receivers": [receiver]}
        )
        target = urls["alertmanager"].removeprefix("http://")
        prometheus = written(
            place / "prometheus.yml",
            {
                "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                "rule_files": [str(RULES)],
                "alerting": {"alertmanagers": [{"static_configs": [{"targets": [target]}]}]},
                "scrape_configs": [
                    {
                        "job_name": "sluicegate",
                        "static_configs": [{"targets": [f"127.0.0.1:{ports['service']}"]}],
                    }
                ],
            },
        )
        service = (sys.executable, "-m", "tests.word_service", f"--port={ports['service']}")
        running = process(place / "service.log", *service, f"--data-directory={place / 'data'}")
        stack.enter_context(running)
        assert eventually(lambda: answers(f"{urls['service']}/health/ready"))
        stack.enter_context(
            process(
                place / "alertmanager.log",
                "prometheus-alertmanager",
                f"--config.file={alertmanager}",
                f"--storage.path={place / 'alertmanager'}",
                f"--web.listen-address={target}",
                "--cluster.listen-address=",
            )
        )
        stack.enter_context(
            process(
                place / "prometheus.log",
                "prometheus",
                f"--config.file={prometheus}",
                f"--storage.tsdb.path={place / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{ports['prometheus']}",
            )
        )
        assert eventually(lambda: answers(f"{urls['prometheus']}/-/ready"))
        stack.enter_context(traffic(urls["service"]))
        yield made


@with_prometheus
@pytest.mark.parametrize("query", panel_queries(), ids=lambda query: query.place)
def test_every_panel_shows_data(live: Live, query: Query) -> None:
    assert eventually(lambda: live.query(query.expr)), query.expr


# What is shown at 0 from the start is data too: here something must have come.
@with_prometheus
@pytest.mark.parametrize(
    "series",
    [
        'refused_requests_total{reason="invalid"}',
        'cache_requests_total{tier="local", result="hit"}',
        'cache_requests_total{tier="redis", result="hit"}',
        'cache_requests_total{tier="redis", result="miss"}',
        'rounds_total{result="rescued"}',
        'rounds_total{result="exhausted"}',
        'bypasses_total{reason="open_route"}',
        'outcomes_total{direction="prompt", outcome="blocked"}',
        'outcomes_total{direction="response", outcome="regenerated"}',
        'flagged_total{severity="severe"}',
        'records_total{result="stored"}',
    ],
)
def test_the_traffic_brings_about_what_the_panels_tell_apart(live: Live, series: str) -> None:
    assert eventually(lambda: live.query(f"rate(sluicegate_{series}[10s]) > 0"))


@with_prometheus
@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_every_variable_has_values(live: Live, file: Path) -> None:
    for variable in json.loads(file.read_text("utf-8"))["templating"]["list"]:
        if variable["type"] != "query":
            continue
        asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        assert asked is not None
        found = eventually(lambda expr=asked[1]: live.query(_substituted(expr)))  # type: ignore[misc]
        assert all(asked[2] in one["metric"] for one in found)


@with_prometheus
def test_rules_ask_only_for_what_the_service_shows(live: Live) -> None:
    shown = set(re.findall(r"^(sluicegate_\w+)", metrics(live), re.MULTILINE))
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for rule in rules():
        expr = str(rule["expr"])
        asked = set(re.findall(r"[\w:]*sluicegate_\w+(?::\w+)*", expr))
        assert asked <= shown | recorded, asked - shown - recorded


def metrics(live: Live) -> str:
    return httpx.get(f"{live.url}/metrics", trust_env=False).text


@with_prometheus
def test_every_rule_can_be_evaluated(live: Live) -> None:
    def groups() -> list[Any]:
        found: list[Any] = live.prometheus.get("/api/v1/rules").json()["data"]["groups"]
        every = [rule for group in found for rule in group["rules"]]
        return every if all(rule["health"] != "unknown" for rule in every) else []

    states = {rule["name"]: rule["health"] for rule in eventually(groups)}
    assert len(states) == len({rule.get("alert") or rule["record"] for rule in rules()})
    assert set(states.values()) == {"ok"}


@with_prometheus
def test_an_alert_reaches_who_is_to_be_told(live: Live) -> None:
    def bypassed() -> list[dict[str, Any]]:
        return [one for one in live.told if one["labels"]["alertname"] == "Bypassed"]

    told = eventually(bypassed)[0]
    assert told["status"] == "firing"
    assert told["labels"]["severity"] == "critical"
    assert told["annotations"]["summary"] == (
        "sluicegate: texts passed without a verdict (open_route)"
    )
    assert told["annotations"]["runbook_url"] == "docs/runbook.md#bypassed"


@with_prometheus
def test_no_text_of_a_client_is_in_what_is_told(live: Live) -> None:
    eventually(lambda: live.told)
    assert "hopeless" not in json.dumps(live.told) + metrics(live)
