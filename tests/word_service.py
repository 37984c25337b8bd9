"""Serves as ``sluicegate serve`` does, with the word guard, a fake upstream and a shared cache.

``python -m tests.word_service --port N --data-directory DIR``. The fake answers what a prompt asks
for: ``again`` is answered badly and then well, ``hopeless`` badly every time, all else well.
"""

from __future__ import annotations

import argparse
import json
from contextlib import AsyncExitStack
from pathlib import Path

import uvloop
from pydantic import SecretStr

from service.private_valkey import PrivateValkey
from service.server import serve
from service.settings import Settings
from tests.fake_upstream import Answer, FakeUpstream, Received, text
from tests.guards import WordGuard

SAFE, BAD = "a fine day", "minor-insulting_behavior here"
OPEN_ROUTE = "/v1/rerank"
CACHE_BYTES = 64 * 1024 * 1024


def answer(received: Received) -> Answer:
    """What the fake says."""
    if received.path == OPEN_ROUTE:
        return Answer(body=b"{}")
    asked = json.dumps(received.json["messages"])
    is_retry = b"A previous answer" in received.body
    if "hopeless" in asked or ("again" in asked and not is_retry):
        return text(BAD)
    return text(SAFE)


async def run(port: int, data_directory: Path) -> None:
    """Serves until it is told to stop."""
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(FakeUpstream(answer))
        shared = PrivateValkey(data_directory / "shared", CACHE_BYTES)
        stack.push_async_callback(shared.stop)
        settings = Settings(
            port=port,
            upstream=upstream.url,
            data_directory=data_directory,
            cache_url=SecretStr(await shared.start()),
            # So few that some are found only in the shared cache.
            cached_verdicts=4,
            open_routes=(f"GET {OPEN_ROUTE}",),
        )
        await serve(settings, WordGuard())


def main() -> None:
    """Reads the flags, and serves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--data-directory", type=Path, required=True)
    options = parser.parse_args()
    uvloop.run(run(options.port, options.data_directory))


if __name__ == "__main__":
    main()
