"""What the benchmarks of streams read of a service, and how they show it."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich import box
from rich.table import Table

STATE: Final = "valkey-server"


def table(title: str, *columns: str) -> Table:
    """A table that Markdown reads."""
    return Table(*columns, title=title, box=box.MARKDOWN)


def cpu_seconds(process_id: int) -> tuple[float, float]:
    """So far, of a proxy and of its private Valkey: to the nanosecond, where ``Target.cpu`` counts
    in hundredths, which are much of what nginx takes.
    """
    parents, names = {}, {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, rest = status.read_text().rpartition(")")
        except OSError:
            continue
        number = int(status.parent.name)
        parents[number], names[number] = int(rest.split()[1]), head.partition("(")[2]
    found = [process_id]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    seconds = {
        number: sum(
            int(thread.read_text().split()[0])
            for thread in Path(f"/proc/{number}/task").glob("*/schedstat")
        )
        / 1e9
        for number in found
    }
    state = sum(spent for number, spent in seconds.items() if names[number] == STATE)
    return sum(seconds.values()) - state, state


async def metrics(port: int) -> dict[str, float]:
    """Every figure that the service shows, under its name and labels."""

    def fetched() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
            return str(response.read().decode())

    lines: Sequence[str] = (await asyncio.to_thread(fetched)).splitlines()
    parts = (_SAMPLE.fullmatch(line) for line in lines)
    return {part[1]: float(part[2]) for part in parts if part}


_SAMPLE: Final = re.compile(r"([a-z_]+(?:\{.*\})?) (\S+)")
