"""The command. Each verb loads the part it needs, so that serving never imports a trainer."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from models.text_guard import TextGuard
    from models.verdict import Verdict
    from service.settings import Settings

app = typer.Typer(
    help="Guardrail for language models: moderates text, guards a chat, trains its guards.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
eval_app = typer.Typer(help="Measure a guard on labelled examples.", no_args_is_help=True)
train_app = typer.Typer(
    help="Run a training stage (needs the extra 'train').", no_args_is_help=True
)
policy_app = typer.Typer(help="Work with policy files.", no_args_is_help=True)
upstream_app = typer.Typer(help="Get a model to guard.", no_args_is_help=True)
keys_app = typer.Typer(help="Make and end API keys.", no_args_is_help=True)
labels_app = typer.Typer(help="Get at what reviewers said.", no_args_is_help=True)
app.add_typer(eval_app, name="eval")
app.add_typer(train_app, name="train")
app.add_typer(policy_app, name="policy")
app.add_typer(upstream_app, name="upstream")
app.add_typer(keys_app, name="keys")
app.add_typer(labels_app, name="labels")

T = TypeVar("T")
GuardOption = Annotated[
    Path | None, typer.Option("--guard", help="Checkpoint directory; the shipped guard if unset.")
]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="YAML file of settings.")]
StateOption = Annotated[
    str | None, typer.Option("--state-url", help="Redis; private Valkey if unset.")
]
DataOption = Annotated[Path | None, typer.Option("--data-directory", help="Where state lives.")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON in place of a table.")]


def main() -> None:
    """Entry point."""
    # Before ONNX Runtime is imported: it would report its use to its maker.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    app()


@app.command()
def serve(
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    admin_port: Annotated[int | None, typer.Option(help="Port of its own for metrics.")] = None,
    upstream: Annotated[str | None, typer.Option(help="URL of the server to guard.")] = None,
    policy: Annotated[Path | None, typer.Option(help="Policy file.")] = None,
    guard: GuardOption = None,
    state_url: Annotated[str | None, typer.Option(help="Redis; private Valkey if unset.")] = None,
    data_directory: Annotated[Path | None, typer.Option(help="Where state lives.")] = None,
) -> None:
    """Answer moderation requests and, with an upstream, guard its chats."""
    import uvloop

    from service.errors import ConfigurationError
    from service.logs import configure
    from service.server import serve as run
    from service.settings import load

    flags: dict[str, Any] = {
        "host": host,
        "port": port,
        "admin_port": admin_port,
        "upstream": upstream,
        "policy": policy,
        "guard": guard,
        "state_url": state_url,
        "data_directory": data_directory,
    }
    try:
        # uvicorn chooses the loop only where it makes it.
        settings = load(config, flags)
        configure(settings.log_format)
        uvloop.run(run(settings))
    except ConfigurationError as error:
        _refuse(error)


@app.command()
def moderate(
    texts: Annotated[list[str], typer.Argument(help="Texts, or - to read standard input.")],
    guard: GuardOption = None,
    as_json: JsonOption = False,
) -> None:
    """Judge texts here and now, without a server.

    With - the lines of standard input are judged; a line that is a JSON object is a labelled
    example or has a key "text", and comes back as JSON with a key "verdict".
    """
    for text in texts:
        if not _is_text(text):
            _refuse("an argument is not UTF-8")
    loaded = _load_guard(guard)
    if texts == ["-"]:
        _moderate_lines(loaded, as_json)
        return
    from models.guard import judge
    from models.inputs import GuardInput

    verdicts = judge(loaded, [GuardInput("prompt", text) for text in texts])
    if as_json:
        for verdict in verdicts:
            print(json.dumps(_described(verdict)))
        return
    table = Table("severity", "score", "categories", "signals", "text")
    for text, verdict in zip(texts, verdicts, strict=True):
        table.add_row(
            verdict.level.label,
            f"{verdict.severity_score:.2f}",
            ", ".join(verdict.categories),
            ", ".join(verdict.signals),
            # Not as markup: what is judged is shown as it is.
            Text(text if len(text) <= 60 else f"{text[:59]}…"),
        )
    Console().print(table)


@eval_app.command("guard")
def eval_guard(
    data: Annotated[
        list[Path] | None, typer.Option(help="JSON lines of labelled examples; repeatable.")
    ] = None,
    suite: Annotated[
        Path | None, typer.Option(help="Suite file; without --data, the shipped one if unset.")
    ] = None,
    data_directory: Annotated[
        Path, typer.Option(help="Where the files are that the suite names.")
    ] = Path("data"),
    guard: GuardOption = None,
    as_json: JsonOption = False,
    report: Annotated[
        Path | None,
        typer.Option(help="Directory for JSON, Markdown and plots (needs the extra 'report')."),
    ] = None,
    latency: Annotated[bool, typer.Option("--latency", help="Time the guard here, too.")] = False,
    require: Annotated[
        list[str] | None,
        typer.Option(help="Figure that must hold, such as f1>=0.8; else the exit status is 1."),
    ] = None,
) -> None:
    """Agreement of a guard with labelled examples, of files or of a suite of them."""
    from training.evaluate import evaluate
    from training.labelled import LabelError
    from training.recipe import RecipeError
    from training.requirement import RequirementError, figures, parse
    from training.suite import DEFAULT_SUITE, files_as_suite, read_suite

    if data and suite:
        _refuse("--data and --suite exclude each other")
    loaded = _load_guard(guard)
    writer = report and _needs_extra(
        lambda: __import__("training.report", fromlist=["write"]), "report"
    )
    try:
        requirements = [parse(one) for one in require or []]
        read = files_as_suite(data) if data else read_suite(suite or DEFAULT_SUITE, data_directory)
    except (LabelError, RecipeError, RequirementError) as error:
        _refuse(error)
    screen = Console(stderr=True)
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as progress:

        def bars(name: str, total: int) -> Callable[[int], None]:
            task = progress.add_task(name, total=total)
            return lambda done: progress.advance(task, done)

        result = evaluate(loaded, read, bars, threads=_threads() if latency else None)
    if writer:
        try:
            writer.write(result, report)
        except OSError as error:
            _refuse(f"{report} cannot be written: {error.strerror}")
    if data and len(data) == 1:
        (only,) = result["sets"].values()
        flat = {"guard": result["guard"]} | only
        flat |= {"latency": result["latency"]} if latency else {}
    else:
        flat = result
    if as_json:
        print(json.dumps(flat))
    else:
        _print_tables(result, data)
    try:
        failures = [one.failure(figures(flat)) for one in requirements]
    except RequirementError as error:
        _refuse(error)
    for failure in filter(None, failures):
        print(f"sluicegate: {failure}", file=sys.stderr)
    if any(failures):
        raise typer.Exit(1)


RecipeOption = Annotated[
    Path, typer.Option("--config", help="Recipe, such as training/configs/guard.yaml.")
]
OutputOption = Annotated[Path, typer.Option("--output", help="Directory to make or to go on with.")]
ChangesOption = Annotated[
    list[str] | None, typer.Option("--set", help="key=value in place of the recipe's.")
]


@train_app.command("guard")
def train_guard(config: RecipeOption, output: OutputOption, changes: ChangesOption = None) -> None:
    """Fine-tune an encoder into a text guard."""
    _train("guard", config, output, changes)


@train_app.command("teacher-scores")
def train_teacher_scores(
    config: RecipeOption, output: OutputOption, changes: ChangesOption = None
) -> None:
    """Let a larger guard score every row of a recipe, for a smaller one to learn from."""
    _train("teacher", config, output, changes)


def _train(stage: str, config: Path, output: Path, changes: list[str] | None) -> None:
    module = _needs_extra(lambda: __import__(f"training.{stage}", fromlist=["run"]))
    from training.labelled import LabelError
    from training.recipe import RecipeError, read_recipe

    try:
        metrics = module.run(read_recipe(config, changes or [], module.GuardConfig), output)
    except (LabelError, RecipeError) as error:
        _refuse(error)
    print(json.dumps(metrics, indent=2))


@policy_app.command("check")
def policy_check(file: Annotated[Path, typer.Argument(help="Policy file.")]) -> None:
    """Say whether a policy file is one that the service would take."""
    from service.errors import ConfigurationError
    from service.policy import read_policy

    try:
        policy = read_policy(file)
    except ConfigurationError as error:
        _refuse(error)
    print(f"{file}: policy {policy.id}, {len(policy.rules)} rules, is valid")


@policy_app.command("publish")
def policy_publish(
    file: Annotated[Path, typer.Argument(help="Policy file.")],
    note: Annotated[str, typer.Option(help="Why, for those who read its history.")] = "",
    replaces: Annotated[
        int | None,
        typer.Option(min=0, help="Revision that must be in force; 0: none. Any if unset."),
    ] = None,
    config: ConfigOption = None,
    state_url: StateOption = None,
    data_directory: DataOption = None,
) -> None:
    """Put a policy into force where policy_source is store; all replicas have it in a second."""
    from service import policy_command

    _on_state(
        lambda settings: policy_command.publish(settings, file, note, replaces),
        config,
        state_url,
        data_directory,
        lambda label: print(f"{label} is in force"),
    )


@upstream_app.command("demo")
def upstream_demo(
    output: Annotated[Path | None, typer.Option(help="Directory to make.")] = None,
) -> None:
    """Make a small real model (SmolLM2-135M-Instruct) that vLLM can serve."""
    from service.settings import default_data_directory

    demo = _needs_extra(lambda: __import__("training.demo_upstream", fromlist=["convert_smollm2"]))
    target = output or default_data_directory() / "upstream" / "smollm2"
    try:
        print(demo.convert_smollm2(target))
    except demo.ConversionError as error:
        _refuse(error)


@keys_app.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(help="What people call it.")],
    role: Annotated[
        list[str],
        typer.Option(help="caller, viewer, reviewer, publisher or admin; repeatable."),
    ],
    policy: Annotated[str | None, typer.Option(help="Id of the policy that it is under.")] = None,
    expires: Annotated[str | None, typer.Option(help="When it ends, such as 30d.")] = None,
    route: Annotated[
        list[str] | None, typer.Option(help="Route that it may use; repeatable; all if unset.")
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(help="60/minute, or /v1/moderations=5/second; repeatable."),
    ] = None,
    upstream_key: Annotated[
        str | None, typer.Option(help="Name in the setting upstream_keys.")
    ] = None,
    config: ConfigOption = None,
    state_url: StateOption = None,
    data_directory: DataOption = None,
) -> None:
    """Make a key and print its token, which is shown this once."""
    from service import key_command

    _on_state(
        lambda settings: key_command.create(
            settings,
            name,
            role,
            policy=policy,
            expires=expires,
            routes=route,
            limits=limit or [],
            upstream_key=upstream_key,
        ),
        config,
        state_url,
        data_directory,
        print,
    )


@keys_app.command("list")
def keys_list(
    as_json: JsonOption = False,
    config: ConfigOption = None,
    state_url: StateOption = None,
    data_directory: DataOption = None,
) -> None:
    """Show all keys, never their tokens."""
    from service import key_command

    def show(keys: list[dict[str, Any]]) -> None:
        if as_json:
            for key in keys:
                print(json.dumps(key))
            return
        table = Table(*key_command.COLUMNS, box=box.SIMPLE_HEAD)
        for key in keys:
            table.add_row(*map(Text, key_command.row(key)))
        Console().print(table)

    _on_state(key_command.listed, config, state_url, data_directory, show)


@keys_app.command("revoke")
def keys_revoke(
    identity: Annotated[str, typer.Argument(metavar="ID", help="As keys list shows it.")],
    config: ConfigOption = None,
    state_url: StateOption = None,
    data_directory: DataOption = None,
) -> None:
    """End a key for good; all replicas know within about a second."""
    from service import key_command

    _on_state(
        lambda settings: key_command.revoke(settings, identity),
        config,
        state_url,
        data_directory,
        lambda name: print(f"the key {identity} ({name}) is revoked"),
    )


@keys_app.command("rotate")
def keys_rotate(
    identity: Annotated[str, typer.Argument(metavar="ID", help="As keys list shows it.")],
    keep: Annotated[str, typer.Option(help="How long the old token holds, such as 24h.")] = "0s",
    config: ConfigOption = None,
    state_url: StateOption = None,
    data_directory: DataOption = None,
) -> None:
    """Give a key a new token and print it."""
    from service import key_command

    _on_state(
        lambda settings: key_command.rotate(settings, identity, keep),
        config,
        state_url,
        data_directory,
        print,
    )


@labels_app.command("export")
def labels_export(
    output: Annotated[Path, typer.Option(help="JSON lines; what it holds already stays.")],
    config: ConfigOption = None,
    state_url: StateOption = None,
    data_directory: DataOption = None,
) -> None:
    """Add what reviewers said to a file of labelled examples, as training reads them."""
    from service import label_command

    def show(exported: label_command.Exported) -> None:
        counts = exported.counts
        print(f"{output}: {counts.examples} new examples, {exported.examples} in all")
        if counts.without_text:
            print(f"{counts.without_text} labels are left out: no text is kept of them")
        if counts.unreadable:
            print(f"{counts.unreadable} labels are left out: a later release wrote them")

    _on_state(
        lambda settings: label_command.export(settings, output),
        config,
        state_url,
        data_directory,
        show,
    )


def _on_state(
    work: Callable[[Settings], Coroutine[Any, Any, T]],
    config: Path | None,
    state_url: str | None,
    data_directory: Path | None,
    show: Callable[[T], None],
) -> None:
    """Shows what ``work`` gives, with the settings of the service."""
    import asyncio

    from service.errors import ConfigurationError, SluicegateError
    from service.keys import KeyFormatError
    from service.settings import load

    # The state says in the log what an error says again.
    logging.basicConfig(level=logging.CRITICAL)
    try:
        settings = load(config, {"state_url": state_url, "data_directory": data_directory})
        show(asyncio.run(work(settings)))
    except (ConfigurationError, SluicegateError, KeyFormatError) as error:
        _refuse(error)


def _print_tables(result: dict[str, Any], data: Sequence[Path] | None) -> None:
    """Of one file all tables; of several those that stand beside each other."""
    from training import tables

    console = Console()
    names = ", ".join(path.name for path in data) if data else f"the suite {result['suite']}"
    console.print(Text(f"{result['guard']} on {names}", style="bold"))
    console.print(Text(tables.NOTE, style="dim"))
    shown = list(tables.suite_tables(result))
    if len(result["sets"]) == 1:
        ((name, report),) = result["sets"].items()
        # What the table of sets and of means would say of one set, its own says.
        shown = [*tables.set_tables(name, report), *shown[2 if result["means"] else 1 :]]
    for one in shown:
        table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        for place, column in enumerate(one.columns):
            side: Literal["left", "right"] = "left" if place < one.words else "right"
            # Names are broken last: figures with their intervals may stand on two lines.
            widest = max((len(row[place]) for row in one.rows), default=0) if not place else 0
            table.add_column(column, justify=side, overflow="fold", min_width=min(widest, 24))
        for row in one.rows:
            table.add_row(*map(Text, row))
        console.print(Text(f"\n{one.title}", style="bold"))
        console.print(table)
        if one.note:
            console.print(Text(f"  {one.note}", style="dim"))


def _moderate_lines(guard: TextGuard, as_json: bool) -> None:
    """Judges standard input in chunks, in order, holding no more than a chunk in memory."""
    from models.guard import judge
    from models.inputs import GuardInput

    def flush(rows: list[tuple[Any, GuardInput]]) -> None:
        verdicts = judge(guard, [item for _, item in rows])
        for (row, item), verdict in zip(rows, verdicts, strict=True):
            if isinstance(row, dict):
                print(json.dumps({**row, "verdict": _described(verdict)}, ensure_ascii=False))
            elif as_json:
                print(json.dumps(_described(verdict)))
            else:
                print(f"{verdict.level.label}\t{verdict.severity_score:.2f}\t{item.text}")
        sys.stdout.flush()

    # Whatever the locale: the data is UTF-8, and what is not is refused by its line.
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape", newline="\n")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    for chunk in _chunks(_input_rows(sys.stdin), 128):
        flush(chunk)


def _input_rows(lines: Iterable[str]) -> Iterator[tuple[Any, Any]]:
    from pydantic import ValidationError

    from models.inputs import GuardInput
    from service.body import parse_object
    from service.errors import BadRequest
    from training.labelled import Example

    for number, line in enumerate(lines, 1):
        text = line.rstrip("\r\n")
        if not _is_text(text):
            _refuse(f"standard input, line {number}: not UTF-8")
        if not text:
            continue
        if not text.startswith("{"):
            yield text, GuardInput("prompt", text)
            continue
        try:
            row = parse_object(text.encode())
            if isinstance(row.get("text"), str):
                yield row, GuardInput("prompt", row["text"])
            else:
                yield row, Example.model_validate(row).guard_input()
        except BadRequest as error:
            _refuse(f"standard input, line {number}: {error}")
        except ValidationError:
            _refuse(f"standard input, line {number}: neither a text nor a labelled example")


def _is_text(text: str) -> bool:
    """Whether ``text`` came as UTF-8; what did not, holds halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    chunk: list[T] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _described(verdict: Verdict) -> dict[str, Any]:
    from service.moderations import described

    return described(verdict)


def _load_guard(directory: Path | None) -> TextGuard:
    from models.checkpoint import DEFAULT_GUARD, CheckpointError
    from models.text_guard import TextGuard

    try:
        return TextGuard(directory or DEFAULT_GUARD, threads=_threads())
    except CheckpointError as error:
        _refuse(error)


def _threads() -> int:
    return len(os.sched_getaffinity(0))


def _needs_extra(load: Callable[[], Any], extra: str = "train") -> Any:
    try:
        return load()
    except ModuleNotFoundError as error:
        _refuse(f"{error.name} is not installed: pip install 'sluicegate[{extra}]'")


def _refuse(error: Exception | str) -> NoReturn:
    print(f"sluicegate: {error}", file=sys.stderr)
    raise typer.Exit(2)


if __name__ == "__main__":
    main()
