"""The report of an evaluation as files: JSON, Markdown and plots. Needs the extra ``report``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from training import plots, tables
from training.tables import Table


def write(result: dict[str, Any], directory: Path) -> None:
    """Writes ``report.json``, ``report.md`` and the plots; replaces what is there."""
    directory.mkdir(parents=True, exist_ok=True)
    drawn = plots.draw(result, directory)
    (directory / "report.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    (directory / "report.md").write_text(markdown(result, drawn), "utf-8")


def markdown(result: dict[str, Any], drawn: Sequence[str] = ()) -> str:
    """The whole report; ``drawn`` names the plots that lie beside it."""
    parts = [f"# {result['guard']} on the suite {result['suite']}", tables.NOTE]
    for table in tables.suite_tables(result):
        parts += _section(table, "##")
    parts += [f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in drawn]
    for name, report in result["sets"].items():
        first, *rest = tables.set_tables(name, report)
        parts += _section(first, "##")
        for table in rest:
            parts += _section(table, "###")
    return "\n\n".join(parts) + "\n"


def _section(table: Table, heading: str) -> Iterator[str]:
    yield f"{heading} {table.title}"
    rule = ["---"] * table.words + ["---:"] * (len(table.columns) - table.words)
    yield "\n".join(_line(row) for row in (table.columns, rule, *table.rows))
    if table.note:
        yield table.note


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
