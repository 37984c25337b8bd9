"""The command: what it prints, and the one line and exit status 2 with which it refuses."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

import service.server
from models import checkpoint, inputs
from models.taxonomy import CATEGORIES, Severity
from sluicegate import app
from tests.checkpoints import TINY, tiny_checkpoint
from tests.guards import CANARY

ROOT = Path(__file__).parent.parent
LEVELS = {level.label for level in Severity}

EXAMPLE = {"id": "1", "source": "s", "role": "prompt", "prompt": "how is the weather"}
ANSWER = EXAMPLE | {"id": "2", "role": "response", "response": "it is fine"}


@pytest.fixture(autouse=True)
def a_wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("guard"))


def run(*arguments: str | Path, given: bytes = b"") -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], input=given)


def refused(*arguments: str | Path, given: bytes = b"") -> str:
    """The one line with which a command refuses."""
    result = run(*arguments, given=given)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line.removeprefix("sluicegate: ")


def objects(result: Result) -> list[Any]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def is_verdict(shown: Any) -> bool:
    return bool(shown["severity"] in LEVELS and [*shown["harm_categories"]] == [*CATEGORIES])


class TestModerate:
    def test_texts_are_shown_in_a_table(self, guard: Path) -> None:
        result = run("moderate", "--guard", guard, "how is the weather", "a" * 100)
        assert result.exit_code == 0
        assert "how is the weather" in result.stdout
        assert f"{'a' * 59}…" in result.stdout

    @pytest.mark.parametrize("text", ["[bold]x[/bold]", "[/b]", "[link=a]x", ":smile:"])
    def test_a_text_is_shown_as_it_is_and_not_as_markup(self, guard: Path, text: str) -> None:
        assert text in run("moderate", "--guard", guard, text).stdout

    def test_json_is_a_verdict_a_line(self, guard: Path) -> None:
        shown = objects(run("moderate", "--guard", guard, "--json", "how is it", "what"))
        assert len(shown) == 2
        assert all(map(is_verdict, shown))

    def test_lines_of_standard_input_come_back_with_their_level(self, guard: Path) -> None:
        result = run("moderate", "--guard", guard, "-", given="how\n\ncafé is fine\r\n".encode())
        rows = [line.split("\t") for line in result.stdout.splitlines()]
        assert [row[2] for row in rows] == ["how", "café is fine"]
        assert all(row[0] in LEVELS and re.fullmatch(r"\d\.\d\d", row[1]) for row in rows)

    def test_objects_of_standard_input_come_back_with_their_verdict(self, guard: Path) -> None:
        rows = [{"text": "how is it", "mine": {"kept": [1, "é"]}}, EXAMPLE, ANSWER]
        given = "\n".join(json.dumps(row) for row in rows).encode()
        shown = objects(run("moderate", "--guard", guard, "-", given=given))
        verdicts = [row.pop("verdict") for row in shown]
        assert shown == rows
        assert all(map(is_verdict, verdicts))
        # The answer is judged as one, and not its prompt.
        assert verdicts[2]["coverage"]["characters"]["total"] == len("it is fine")

    def test_more_lines_than_a_chunk_keep_their_order(self, guard: Path) -> None:
        given = b"".join(b'{"text": "how", "n": %d}\n' % n for n in range(300))
        shown = objects(run("moderate", "--guard", guard, "-", given=given))
        assert [row["n"] for row in shown] == list(range(300))

    def test_lines_with_json_are_verdicts(self, guard: Path) -> None:
        shown = objects(run("moderate", "--guard", guard, "-", "--json", given=b"how\nwhat"))
        assert len(shown) == 2
        assert all(map(is_verdict, shown))

    def test_nothing_given_is_nothing_said(self, guard: Path) -> None:
        assert objects(run("moderate", "--guard", guard, "-")) == []

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            (b"\xff", "UTF-8"),
            (b'{"text": "' + CANARY.encode(), "not JSON"),
            (b'{"text": "a", "text": "b"}', "twice"),
            (b'{"text": "\\ud800"}', "surrogate"),
            (b'{"text": "a", "b": "\\ud800"}', "surrogate"),
            (b'{"text": 3}', "neither a text nor a labelled example"),
            (b'{"prompt": "a"}', "neither a text nor a labelled example"),
            (json.dumps(EXAMPLE | {"severity": 9}).encode(), "labelled example"),
            (b'{"a": ' + b"[" * 9000 + b"]" * 9000 + b"}", "deeply"),
        ],
    )
    def test_a_line_that_cannot_be_read_is_named(self, guard: Path, line: bytes, says: str) -> None:
        message = refused("moderate", "--guard", guard, "-", given=b"how\n" + line + b"\n")
        assert "line 2" in message
        assert says in message
        assert CANARY not in message

    def test_an_argument_that_is_not_text_is_refused(self) -> None:
        assert "UTF-8" in refused("moderate", "a\udcff")

    def test_a_text_is_needed(self) -> None:
        assert run("moderate").exit_code == 2

    def test_a_pipe_is_utf_8_whatever_the_locale(self, guard: Path) -> None:
        """The command as it is installed, and as a process."""
        environment = os.environ | {
            "LC_ALL": "C",
            "PYTHONUTF8": "0",
            "PYTHONCOERCECLOCALE": "0",
        }
        done = subprocess.run(
            [sys.executable, ROOT / "sluicegate.py", "moderate", "--guard", guard, "-"],
            input='{"text": "café"}\nthe café'.encode(),
            env=environment,
            capture_output=True,
            check=True,
        )
        first, second = done.stdout.decode().splitlines()
        assert json.loads(first)["text"] == "café"
        assert second.endswith("\tthe café")


class TestGuards:
    """A checkpoint that cannot be used is refused in the same way by each command."""

    @pytest.fixture
    def broken(self, tmp_path: Path) -> Path:
        return tiny_checkpoint(tmp_path / "guard")

    def test_one_that_is_not_there(self, tmp_path: Path) -> None:
        for verb in (
            ["moderate", "a"],
            ["eval", "guard", "--data", "x"],
            ["serve", "--port", "0", "--data-directory", str(tmp_path)],
        ):
            assert "no checkpoint at" in refused(*verb, "--guard", tmp_path / "gone")

    @pytest.mark.parametrize("name", [checkpoint.ONNX, checkpoint.TOKENIZER])
    def test_one_that_was_cut_short(self, broken: Path, name: str) -> None:
        file = broken / name
        file.write_bytes(file.read_bytes()[:-1])
        assert name in refused("moderate", "--guard", broken, "a")

    def test_one_of_another_build(self, broken: Path) -> None:
        card = broken / checkpoint.CARD
        ours = f'"input_version": {inputs.VERSION}'
        card.write_text(card.read_text().replace(ours, '"input_version": 99'))
        assert "input_version is 99" in refused("moderate", "--guard", broken, "a")

    def test_one_that_does_not_reproduce_its_golden_texts_is_not_served(
        self, broken: Path, tmp_path: Path
    ) -> None:
        file = broken / checkpoint.GOLDEN
        golden = checkpoint.Golden.model_validate_json(file.read_bytes())
        case = golden.cases[0].model_copy(update={"at_least": (1.0, 1.0, 1.0)})
        file.write_text(golden.model_copy(update={"cases": (case,)}).model_dump_json())
        checkpoint.write_card(broken, checkpoint.Checkpoint(broken).card)
        message = refused(
            "serve", "--port", "0", "--guard", broken, "--data-directory", tmp_path / "data"
        )
        assert "golden text 0 differs" in message


class TestEvaluate:
    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        rows = [
            EXAMPLE | {"unsafe": False, "severity": 0},
            EXAMPLE
            | {"id": "3", "unsafe": True, "severity": 2, "pku_categories": ["drugs"], "lang": "de"},
            ANSWER | {"unsafe": False, "severity": 0, "refusal": False},
        ]
        file = tmp_path / "data.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)) + "\n")
        return file

    def test_json_holds_the_figures(self, guard: Path, data: Path) -> None:
        (shown,) = objects(run("eval", "guard", "--data", data, "--guard", guard, "--json"))
        assert shown["n"] == 3
        assert shown["language"] == {"en": 2, "de": 1}
        assert shown["f1"] is None or 0 <= shown["f1"] <= 1
        assert {"precision", "recall", "fpr", "severity_qwk", "category_micro_f1"} <= shown.keys()
        assert shown["intervals"].keys() >= {"f1", "auprc", "severity_qwk"}
        assert shown["by_language"]["de"]["n"] == 1
        assert shown["guard"] == TINY

    def test_several_files_have_an_object_each(self, guard: Path, data: Path) -> None:
        other = data.with_name("other.jsonl")
        other.write_text(json.dumps(EXAMPLE | {"unsafe": True}))
        files: list[str | Path] = ["--data", data, "--data", other]
        (shown,) = objects(run("eval", "guard", *files, "--guard", guard, "--json", "--latency"))
        assert {name: one["n"] for name, one in shown["sets"].items()} == {"data": 3, "other": 1}
        assert shown["means"]["prompt_f1"] == shown["sets"]["other"]["f1"]
        assert shown["latency"]["machine"]["cores"] >= 1

    def test_a_suite_names_its_files_within_a_directory(self, guard: Path, data: Path) -> None:
        suite = data.with_name("suite.yaml")
        sets = "[{name: ours, file: data.jsonl, group: prompt, half: whole, role: prompt}]"
        suite.write_text(f"name: mine\nsets: {sets}\nrobustness: {{limit: 2}}\n")
        place: list[str | Path] = ["--suite", suite, "--data-directory", data.parent]
        (shown,) = objects(run("eval", "guard", *place, "--guard", guard, "--json"))
        assert shown["sets"]["ours"]["n"] == 2
        assert shown["robustness"]["n"] == 2
        table = run("eval", "guard", *place, "--guard", guard).stdout
        assert f"{TINY} on the suite mine" in table
        assert "zero_width" in table

    def test_without_files_the_shipped_suite_is_taken(self, guard: Path, tmp_path: Path) -> None:
        message = refused("eval", "guard", "--guard", guard, "--data-directory", tmp_path)
        assert f"{tmp_path}/annotated/severity_dev.jsonl cannot be read" in message

    def test_files_and_a_suite_exclude_each_other(self, data: Path) -> None:
        assert "exclude" in refused("eval", "guard", "--data", data, "--suite", data)

    def test_a_faulty_suite_is_refused_by_its_key(self, guard: Path, data: Path) -> None:
        suite = data.with_name("suite.yaml")
        suite.write_text("name: mine\nsets: []\n")
        message = refused("eval", "guard", "--suite", suite, "--guard", guard)
        assert "suite.yaml: sets" in message

    def test_a_report_is_written(self, guard: Path, data: Path, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason="needs the extra 'report'")
        place: list[str | Path] = ["--data", data, "--guard", guard, "--report"]
        assert run("eval", "guard", *place, tmp_path / "report").exit_code == 0
        written = {path.name for path in (tmp_path / "report").iterdir()}
        assert {"report.json", "report.md", "sets.png"} <= written
        (tmp_path / "file").write_text("")
        message = refused("eval", "guard", *place, tmp_path / "file")
        assert "file cannot be written" in message

    def test_what_is_required_and_holds_is_not_spoken_of(self, guard: Path, data: Path) -> None:
        holds = ["--require", "n>=3", "--require", "ece<=1"]
        result = run("eval", "guard", "--data", data, "--guard", guard, *holds)
        assert (result.exit_code, result.stderr) == (0, "")

    def test_each_figure_that_fails_is_named(self, guard: Path, data: Path) -> None:
        wanted = ["--require", "n>=4", "--require", "ece>1", "--require", "n>=1"]
        result = run("eval", "guard", "--data", data, "--guard", guard, "--json", *wanted)
        assert result.exit_code == 1
        first, second = result.stderr.splitlines()
        assert first == "sluicegate: n is 3, but must be >= 4"
        assert re.fullmatch(r"sluicegate: ece is 0\.\d+, but must be > 1", second)
        assert json.loads(result.stdout)["n"] == 3

    @pytest.mark.parametrize("requirement", ["f1", "f3>=0.8"])
    def test_a_requirement_that_means_nothing_is_refused(
        self, guard: Path, data: Path, requirement: str
    ) -> None:
        result = run("eval", "guard", "--data", data, "--guard", guard, "--require", requirement)
        assert result.exit_code == 2
        assert "sluicegate: " in result.stderr

    def test_the_table_names_the_guard_and_the_data(self, guard: Path, data: Path) -> None:
        result = run("eval", "guard", "--data", data, "--guard", guard)
        assert result.exit_code == 0
        assert f"{TINY} on data.jsonl" in result.stdout
        assert "severity_qwk" in result.stdout

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"", "no example"),
            (b"\n\n", "no example"),
            (b"{", "line 1"),
            (json.dumps(EXAMPLE).encode() + b"\n3\n", "line 2"),
            (json.dumps(EXAMPLE | {"colour": 1}).encode(), "colour"),
            (json.dumps(EXAMPLE | {"severity": 9}).encode(), "severity"),
            (b"\xff", "UTF-8"),
        ],
    )
    def test_a_file_that_cannot_be_read_is_refused_by_its_line(
        self, guard: Path, data: Path, content: bytes, says: str
    ) -> None:
        data.write_bytes(content)
        message = refused("eval", "guard", "--data", data, "--guard", guard)
        assert str(data) in message
        assert says in message

    def test_a_file_that_is_not_there_is_named(self, guard: Path, tmp_path: Path) -> None:
        gone = tmp_path / "gone.jsonl"
        assert str(gone) in refused("eval", "guard", "--data", gone, "--guard", guard)


class TestPublish:
    """``sluicegate policy publish``, each in a data directory of its own."""

    @pytest.fixture
    def publish(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
        """Publishes a text as a file's, with what else is said."""
        monkeypatch.setenv("SLUICEGATE_POLICY_SOURCE", "store")
        file = tmp_path / "policy.yaml"

        def made(text: str, *more: str) -> Result:
            file.write_text(text)
            return run("policy", "publish", file, "--data-directory", tmp_path / "data", *more)

        return made

    def test_a_file_comes_into_force_and_is_replaced(self, publish: Callable[..., Result]) -> None:
        text = "version: 1\nid: house\nrules: [{action: allow}]"
        assert publish(text, "--replaces", "0").stdout == "house@1 is in force\n"
        assert publish(text, "--note", "again").stdout == "house@2 is in force\n"
        stale = publish(text, "--replaces", "1")
        assert stale.exit_code == 2
        assert "revision 2 of the policy house is in force" in stale.stderr

    def test_what_is_wrong_is_said_with_the_name_of_the_file(
        self, publish: Callable[..., Result]
    ) -> None:
        result = publish("version: 1\nid: house\nrules:\n  - {action: explode}\n")
        assert result.exit_code == 2
        assert "policy.yaml, line 4" in result.stderr

    def test_where_policies_are_files_it_says_so(
        self, publish: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SLUICEGATE_POLICY_SOURCE", "file")
        result = publish("version: 1\nid: house\nrules: [{action: allow}]")
        assert result.exit_code == 2
        assert "set policy_source: store" in result.stderr


class TestPolicy:
    def test_a_policy_that_the_service_would_take(self, tmp_path: Path) -> None:
        file = tmp_path / "policy.yaml"
        file.write_text("version: 1\nid: house\nrules: [{action: allow}]")
        result = run("policy", "check", file)
        assert result.exit_code == 0
        assert "policy house, 1 rules, is valid" in result.stdout

    def test_one_that_it_would_not_take(self, tmp_path: Path) -> None:
        file = tmp_path / "policy.yaml"
        file.write_text("version: 1\nid: house\nrules:\n  - {action: explode}\n")
        message = refused("policy", "check", file)
        assert f"{file}, line 4" in message
        assert "explode" in message

    def test_one_that_is_not_there(self, tmp_path: Path) -> None:
        assert "gone.yaml" in refused("policy", "check", tmp_path / "gone.yaml")


class TestServe:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        return tmp_path / "data"

    @pytest.fixture
    def config(self, tmp_path: Path) -> Path:
        return tmp_path / "settings.yaml"

    @pytest.fixture
    def taken(self) -> Iterator[int]:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            yield listening.getsockname()[1]

    def test_a_port_in_use_is_named_with_its_flag(self, taken: int, directory: Path) -> None:
        arguments = ("serve", "--port", str(taken), "--data-directory", directory)
        message = refused(*arguments)
        assert f"port {taken}" in message
        assert "--port" in message
        assert not directory.exists()

    def test_an_admin_port_in_use_is_named_with_its_flag(self, taken: int, directory: Path) -> None:
        ports = ("--port", "0", "--admin-port", str(taken))
        assert "--admin-port" in refused("serve", *ports, "--data-directory", directory)

    def test_a_host_that_is_not_here_is_named(self, directory: Path) -> None:
        message = refused("serve", "--host", "192.0.2.1", "--data-directory", directory)
        assert "host 192.0.2.1 is no address of this machine" in message

    @pytest.mark.parametrize(
        ("content", "says"),
        [("colour: red", "colour"), ("port: many", "port"), ("a: [", "line 1"), ("- a", "mapping")],
    )
    def test_a_setting_that_is_wrong_is_refused(
        self, config: Path, content: str, says: str
    ) -> None:
        config.write_text(content)
        assert says in refused("serve", "--config", config)

    def test_a_configuration_that_is_not_there_is_named(self, config: Path) -> None:
        assert str(config) in refused("serve", "--config", config)

    def test_a_bad_policy_is_refused(self, config: Path, directory: Path) -> None:
        config.write_text("version: 1\nid: a\nrules: []")
        arguments = ("--port", "0", "--policy", config, "--data-directory", directory)
        assert f"policy {config}" in refused("serve", *arguments)

    def test_beyond_loopback_without_keys_is_refused_unless_it_is_said(self, config: Path) -> None:
        config.write_text("require_keys: false")
        message = refused("serve", "--config", config, "--host", "192.0.2.1")
        assert "allow_unauthenticated" in message

    @pytest.mark.parametrize("url", ["ftp://a", "a:8000", "http://"])
    def test_an_upstream_that_is_no_address_is_refused(
        self, guard: Path, directory: Path, url: str
    ) -> None:
        arguments = ("--port", "0", "--guard", guard, "--data-directory", directory)
        assert "upstream" in refused("serve", *arguments, "--upstream", url).lower()

    def test_a_data_directory_that_is_none_is_refused(self, config: Path, guard: Path) -> None:
        config.write_text("")
        message = refused("serve", "--port", "0", "--guard", guard, "--data-directory", config)
        assert f"data_directory {config}" in message

    def test_it_runs_on_the_fast_loop(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loops = []

        async def serve(settings: object) -> None:
            loops.append(type(asyncio.get_running_loop()).__module__)

        monkeypatch.setattr(service.server, "serve", serve)
        assert run("serve").exit_code == 0
        assert loops == ["uvloop"]

    @pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
    def test_it_serves_until_it_is_told_to_stop(
        self, guard: Path, directory: Path, stop: signal.Signals
    ) -> None:
        command: list[str | Path] = [sys.executable, ROOT / "sluicegate.py", "serve"]
        command += ["--port", "0", "--guard", guard, "--data-directory", directory]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            log = []
            # A process that ends early closes its end, and with it this loop.
            for line in process.stderr:
                log.append(line)
                if "Started server process" in line:
                    break
            (url,) = re.findall(r"listening on (http://\S+)", "".join(log))
            answer = httpx.post(
                f"{url}/v1/moderations?{CANARY}", json={"input": CANARY}, trust_env=False
            )
            assert is_verdict(answer.json()["results"][0])
            assert "server" not in answer.headers
            process.send_signal(stop)
            rest = process.stderr.read()
            # Everything was closed, which a process that dies of the signal does not do.
            assert process.wait() == 0
        assert "Traceback" not in rest
        assert CANARY not in "".join(log) + rest
        # Its Valkey went with it, and left the record.
        assert not (directory / "valkey.sock").exists()


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "training.guard", None)
    message = refused("train", "guard", "--config", tmp_path, "--output", tmp_path)
    assert "pip install 'sluicegate[train]'" in message


def test_a_report_without_its_extra_is_refused_before_anything_is_judged(
    monkeypatch: pytest.MonkeyPatch, guard: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "training.report", None)
    message = refused("eval", "guard", "--data", "x", "--guard", guard, "--report", tmp_path)
    assert "pip install 'sluicegate[report]'" in message


@pytest.mark.parametrize(
    "verb", [[], ["eval"], ["train"], ["policy"], ["upstream"], ["keys"], ["labels"]]
)
def test_without_a_verb_the_command_says_which_there_are(verb: list[str]) -> None:
    result = run(*verb)
    assert "Usage" in result.output
