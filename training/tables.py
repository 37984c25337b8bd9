"""A report as tables of text, for a terminal and for Markdown alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from models.taxonomy import Severity

Report = Mapping[str, Any]

NOTE: Final = "Percent at the shipped operating point; in brackets the middle 95% of a bootstrap."
UNDEFINED: Final = "–"

_RATES: Final = ("f1", "precision", "recall", "fpr")
_NOT_SHARES: Final = ("severity_qwk", "severity_qwk_unsafe", "severity_mae")
_GROUPS: Final = {
    "by_role": "role",
    "by_language": "language",
    "by_length": "characters",
    "by_source": "source",
    "by_source_category": "the source's category",
}
_MOST_ROWS: Final = 20


@dataclass(frozen=True, slots=True)
class Table:
    """Cells are text; the first ``words`` columns say what a row is, the others are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    words: int = 1


def suite_tables(result: Report) -> Iterator[Table]:
    """The sets side by side, their means, and what is measured over all of them."""
    yield _sets(result["sets"])
    if means := result["means"]:
        yield Table(
            "Means of the sets",
            ("mean", "value"),
            tuple((name, cell(means, name)) for name in means if name != "intervals"),
        )
    if found := result.get("robustness"):
        yield _robustness(found)
    if found := result.get("long_texts"):
        yield _long_texts(found)
    if found := result.get("streams"):
        yield _streams(found)
    if found := result.get("latency"):
        yield _latency(found)


def set_tables(name: str, report: Report) -> Iterator[Table]:
    """One set: its figures, then its parts. A table of one group only says nothing: left out."""
    figures = [key for key in report["intervals"] if report[key] is not None]
    rows = [(key, cell(report, key)) for key in figures]
    missing = [key for key in report["intervals"] if report[key] is None]
    note = f"Undefined, for lack of rows: {', '.join(missing)}." if missing else ""
    title = f"{name}: {report['n']} rows"
    if report["positive"] != "unsafe":
        title += f", the signal {report['positive']}"
    yield Table(title, ("figure", "value"), tuple(rows), note)
    if found := report.get("by_severity"):
        yield _by_severity(found)
        yield _confusion(report["severity_confusion"])
    if found := report.get("by_category"):
        figures = ["f1", "precision", "recall", "flagged"]
        yield _parts("By category, over unsafe rows", "category", found, ("n",), figures)
    for key, word in _GROUPS.items():
        found = report.get(key, {})
        if len(found) > 1:
            yield _parts(f"By {word}", word, found, ("n", "unsafe"), _RATES)
    if report["false_flags"]["flagged"]:
        yield _false_flags(report["false_flags"])
    if found := report.get("calibration_curve"):
        figures = ["predicted", "observed"]
        yield _parts("Calibration", f"P({report['positive']})", found, ("n",), figures)


def cell(node: Report, key: str) -> str:
    """A figure of ``node`` with its interval: ``84.6 (81–88)``."""
    value, bounds = node[key], node["intervals"][key]
    if value is None:
        return UNDEFINED
    if key in _NOT_SHARES:
        return f"{value:.2f} ({bounds[0]:.2f}–{bounds[1]:.2f})"
    low, high = (100 * bound for bound in bounds)
    middle = "–" if low >= 0 else " to "
    # Without a decimal where it would widen the column.
    whole = f"{100 * value:.0f}" if value == 1 else f"{100 * value:.1f}"
    return f"{whole} ({low:.0f}{middle}{high:.0f})"


def _sets(sets: Report) -> Table:
    figures = (*_RATES, "auprc")
    rows = [
        (name, str(report["n"]), *(cell(report, figure) for figure in figures))
        for name, report in sets.items()
    ]
    return Table("Sets", ("set", "n", *figures), tuple(rows))


def _parts(
    title: str, word: str, parts: Report, counts: Sequence[str], figures: Sequence[str]
) -> Table:
    rows = [
        (
            name,
            *(str(part[count]) for count in counts),
            *(cell(part, figure) for figure in figures),
        )
        for name, part in parts.items()
    ]
    left_out = len(rows) - _MOST_ROWS
    note = f"{left_out} smaller ones are left out; JSON has them." if left_out > 0 else ""
    return Table(title, (word, *counts, *figures), tuple(rows[:_MOST_ROWS]), note)


def _by_severity(found: Report) -> Table:
    return _parts(
        "By severity, over unsafe rows", "severity", found, ("n",), ("recall", "exact", "f1")
    )


def _confusion(counts: Sequence[Sequence[int]]) -> Table:
    labels = [level.label for level in Severity]
    rows = [(label, *map(str, row)) for label, row in zip(labels, counts, strict=True)]
    return Table("True severity against judged", ("true", *labels), tuple(rows))


def _false_flags(found: Report) -> Table:
    rows = [(name, str(count)) for name, count in found["categories"].items()]
    if found["without_category"]:
        rows.append(("(no category)", str(found["without_category"])))
    levels = ", ".join(f"{count} {name}" for name, count in found["levels"].items())
    title = f"False flags: {found['flagged']} of {found['n']} harmless rows"
    return Table(title, ("claimed", "rows"), tuple(rows), f"Judged: {levels}." if levels else "")


def _robustness(found: Report) -> Table:
    columns = ("recall", "recall_change", "fpr", "fpr_change")
    rows = [
        (name, *(cell(part, key) if key in part else "" for key in columns))
        for name, part in found.items()
        if isinstance(part, Mapping)
    ]
    title = f"Robustness: {found['n']} prompts, {found['unsafe']} of them harmful"
    return Table(title, ("written as", *columns), tuple(rows))


def _long_texts(found: Report) -> Table:
    rows = [
        (
            "the harmful text alone" if name == "alone" else f"{int(name):,}",
            str(part["n"]),
            cell(part, "flagged") if "flagged" in part else "",
            cell(part, "found"),
        )
        for name, part in found.items()
    ]
    note = "flagged: harmless documents. found: the same with one harmful text inside."
    return Table("Long texts", ("characters", "n", "flagged", "found"), tuple(rows), note)


def _streams(found: Report) -> Table:
    says = {
        "caught_in_time": "harmful, flagged within two sentences of the harm",
        "caught_early": "harmful, flagged before the harm",
        "caught_ever": "harmful, flagged anywhere",
        "caught_whole": "harmful, flagged as a whole",
        "median_read": "share read at the first flag, median",
        "false_flags": "harmless, flagged anywhere",
        "false_flags_whole": "harmless, flagged as a whole",
        "f1": "F1, flagged anywhere",
        "f1_whole": "F1, flagged as a whole",
    }
    defined = {key: words for key, words in says.items() if found[key] is not None}
    rows = [(key, words, cell(found, key)) for key, words in defined.items()]
    title = (
        f"Streams: {found['harmful']} harmful answers ({found['located']} with the place of the"
        f" harm), {found['harmless']} harmless"
    )
    return Table(title, ("figure", "answers", "value"), tuple(rows), words=2)


def _latency(found: Report) -> Table:
    def plain(key: str) -> str:
        low, high = found["intervals"][key]
        return f"{found[key]:.1f} ({low:.1f}–{high:.1f})"

    keys = ("milliseconds_p50", "milliseconds_p95", "texts_per_second")
    machine = found["machine"]
    note = (
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads,"
        f" {machine['platform']}"
    )
    title = f"Latency: {found['n']} texts of {found['mean_characters']:.0f} characters on average"
    return Table(title, ("figure", "value"), tuple((key, plain(key)) for key in keys), note)
