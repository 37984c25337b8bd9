"""The state that the settings name, for commands that run beside a service or without one.

Without a URL that is the private Valkey: of the service that runs, by its socket, or one that is
started for a moment where none runs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

from service.settings import Settings
from service.state import State


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[State]:
    """Raises ``ConfigurationError`` where it can never be used."""
    directory = settings.data_directory
    url = settings.state_url.get_secret_value() if settings.state_url else None
    if url is None:
        url = await _running(directory / "valkey")
    state = await State.open(url, data_directory=directory)
    try:
        yield state
    finally:
        await state.close()


async def _running(directory: Path) -> str | None:
    """The URL of the private Valkey in ``directory``; None where none runs."""
    for socket in _sockets(directory):
        # One that was killed leaves its socket behind; a path can also be too long for one.
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_unix_connection(socket)
            writer.close()
            return f"unix://{quote(str(socket))}"
    return None


def _sockets(directory: Path) -> list[Path]:
    """Where it may listen. The second line of its lock file says where else, if at all."""
    places = [directory.absolute()]
    with contextlib.suppress(OSError, UnicodeDecodeError):
        places += map(Path, (directory / "lock").read_text("utf-8").splitlines()[1:2])
    return [place / "valkey.sock" for place in places]
