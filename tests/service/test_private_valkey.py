"""The private Valkey: a real server, real kills."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis

from service.errors import ConfigurationError
from service.private_valkey import SOCKET_PATH_BYTES, PrivateValkey

ROOT = Path(__file__).parents[2]
MEMORY_BYTES = 64 * 2**20

SERVICE = """
import asyncio, sys
from pathlib import Path
from service.private_valkey import PrivateValkey

async def main():
    valkey = PrivateValkey(Path(sys.argv[1]), 2**26)
    print(await valkey.start(), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture
async def valkey(tmp_path: Path) -> AsyncIterator[PrivateValkey]:
    server = PrivateValkey(tmp_path, MEMORY_BYTES, lock_seconds=0.1, stop_seconds=0.0)
    await server.start()
    yield server
    await server.stop()


def run_service(directory: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SERVICE, str(directory)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def socket_of(url: str) -> Path:
    return Path(urlsplit(url).path)


async def test_it_listens_on_a_socket_of_this_user_alone(valkey: PrivateValkey) -> None:
    url = await valkey.start()

    assert stat.S_IMODE(socket_of(url).stat().st_mode) == 0o700
    async with Redis.from_url(url) as redis:
        assert (await redis.config_get("port"))["port"] == "0"


async def test_it_keeps_everything_and_refuses_when_full(valkey: PrivateValkey) -> None:
    async with Redis.from_url(await valkey.start()) as redis:
        settings = await redis.config_get("maxmemory*", "append*")

    assert settings["maxmemory"] == str(MEMORY_BYTES)
    assert settings["maxmemory-policy"] == "noeviction"
    assert (settings["appendonly"], settings["appendfsync"]) == ("yes", "always")


async def test_it_remembers_across_a_stop(valkey: PrivateValkey) -> None:
    async with Redis.from_url(await valkey.start()) as redis:
        await redis.set("key", "value")
    await valkey.stop()

    async with Redis.from_url(await valkey.start()) as redis:
        assert await redis.get("key") == b"value"


async def test_starting_it_twice_is_starting_it_once(valkey: PrivateValkey) -> None:
    before = valkey.process_id

    await valkey.start()

    assert valkey.process_id == before is not None


async def test_it_starts_again_after_a_kill_and_lost_nothing(valkey: PrivateValkey) -> None:
    async with Redis.from_url(await valkey.start()) as redis:
        await redis.set("key", "value")
    assert valkey.process_id is not None
    os.kill(valkey.process_id, signal.SIGKILL)
    # A dead process is seen at once, but killing takes a moment.
    while valkey.process_id is not None:
        pass

    async with Redis.from_url(await valkey.start()) as redis:
        assert await redis.get("key") == b"value"


async def test_a_second_owner_is_refused(valkey: PrivateValkey, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as refused:
        await PrivateValkey(tmp_path, MEMORY_BYTES, lock_seconds=0.1).start()

    assert str(tmp_path) in str(refused.value)
    assert "another data_directory" in str(refused.value)
    assert valkey.process_id is not None


async def test_the_directory_is_free_after_a_stop(valkey: PrivateValkey, tmp_path: Path) -> None:
    await valkey.stop()
    second = PrivateValkey(tmp_path, MEMORY_BYTES, lock_seconds=0.1)

    await second.start()

    assert second.process_id is not None
    await second.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
@pytest.mark.parametrize("name", ["data", "a-long-name-" * 12], ids=["short path", "long path"])
async def test_it_dies_with_a_service_that_was_killed(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    # The server holds the lock as well, so that the lock is free says that the server is gone.
    successor = PrivateValkey(directory, MEMORY_BYTES, lock_seconds=5.0)
    service = run_service(directory)
    assert service.stdout is not None
    with service, service.stdout:
        url = service.stdout.readline().strip()
        async with Redis.from_url(url) as redis:
            await redis.set("key", "value")
        with pytest.raises(ConfigurationError, match=f"process {service.pid}"):
            await successor.start()
        service.kill()

    try:
        async with Redis.from_url(await successor.start()) as redis:
            assert await redis.get("key") == b"value"
        # What the killed one left in the temporary directory is gone.
        assert not (len(name) > SOCKET_PATH_BYTES and socket_of(url).parent.exists())
    finally:
        await successor.stop()


async def test_a_long_path_gets_a_short_private_socket(tmp_path: Path) -> None:
    valkey = PrivateValkey(tmp_path / ("long" * 30), MEMORY_BYTES)

    socket = socket_of(await valkey.start())

    assert len(os.fsencode(socket)) <= SOCKET_PATH_BYTES
    assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
    await valkey.stop()
    assert not socket.parent.exists()


async def test_a_damaged_file_is_reported_in_one_line(
    valkey: PrivateValkey, tmp_path: Path
) -> None:
    await valkey.stop()
    (manifest,) = (tmp_path / "appendonlydir").glob("*.manifest")
    manifest.write_text("nonsense\n")

    with pytest.raises(ConfigurationError) as failed:
        await valkey.start()

    assert "ended at start" in str(failed.value)
    assert "\n" not in str(failed.value)


async def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    directory = tmp_path / "file" / "valkey"

    with pytest.raises(ConfigurationError, match=f"data_directory: {directory}"):
        await PrivateValkey(directory, MEMORY_BYTES).start()
