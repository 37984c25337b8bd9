"""The spool: lines that are on the disk, in order, until they were sent."""

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from service import spool as module
from service.errors import ConfigurationError, RecordNotKept
from service.spool import Spool

MAX_BYTES = 10_000


class Sink:
    """A receiver that fails where it is told to."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.fails_after: int | None = None

    async def __call__(self, lines: Sequence[bytes]) -> None:
        if self.fails_after is not None and len(self.lines) >= self.fails_after:
            raise ConnectionError("gone")
        self.lines += lines


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "spool.jsonl"


@pytest.fixture
async def spool(path: Path) -> AsyncIterator[Spool]:
    opened = await Spool.open(path, MAX_BYTES)
    yield opened
    await opened.close()


def read(path: Path) -> bytes:
    return path.read_bytes()


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def numbered(count: int) -> list[bytes]:
    return [b'{"n": %d}' % number for number in range(count)]


async def test_lines_are_sent_in_order_and_then_gone(spool: Spool, path: Path) -> None:
    sink = Sink()
    await spool.append(numbered(3))
    assert spool.lines == 3

    assert await spool.drain(sink) == 3

    assert sink.lines == numbered(3)
    assert (spool.lines, spool.size_bytes, read(path)) == (0, 0, b"")


async def test_lines_are_on_the_disk_when_append_returns(spool: Spool, path: Path) -> None:
    await spool.append(numbered(2))

    assert read(path).splitlines() == numbered(2)


async def test_callers_that_wait_together_share_a_sync(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs: list[int] = []
    real = os.fsync

    def sync(fd: int) -> None:
        syncs.append(fd)
        real(fd)

    monkeypatch.setattr(os, "fsync", sync)

    await asyncio.gather(*(spool.append([line]) for line in numbered(50)))

    assert spool.lines == 50
    assert 1 <= len(syncs) <= 3


async def test_the_next_start_finds_what_was_not_sent(path: Path) -> None:
    first = await Spool.open(path, MAX_BYTES)
    await first.append(numbered(3))
    await first.close()
    sink = Sink()

    second = await Spool.open(path, MAX_BYTES)

    assert second.lines == 3
    await second.drain(sink)
    assert sink.lines == numbered(3)
    await second.close()


async def test_half_a_line_left_by_a_crash_is_dropped_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "spool.jsonl"
    write(path, b'{"n": 0}\n{"n": 1}\n{"n"')
    sink = Sink()

    spool = await Spool.open(path, MAX_BYTES)

    assert spool.lines == 2
    assert "half a line" in caplog.text
    await spool.append([b'{"n": 2}'])
    await spool.drain(sink)
    assert sink.lines == numbered(3)
    await spool.close()


async def test_a_full_spool_refuses_clearly_and_takes_lines_again_when_sent(spool: Spool) -> None:
    large = b"x" * (MAX_BYTES - 1)
    await spool.append([large])

    with pytest.raises(RecordNotKept, match="full"):
        await spool.append(numbered(2))

    assert spool.lines == 1
    sink = Sink()
    await spool.drain(sink)
    await spool.append(numbered(2))
    await spool.drain(sink)
    assert sink.lines == [large, *numbered(2)]


async def test_a_write_that_fails_half_way_is_undone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = await Spool.open(path, MAX_BYTES)
    real = os.pwrite

    def half(fd: int, blob: memoryview, place: int) -> int:
        if place == len(b'{"n": 0}\n'):
            return real(fd, blob[:50], place)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    await spool.append(numbered(1))
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", half)
        with pytest.raises(RecordNotKept, match="No space left"):
            await spool.append([b"x" * 100])
    await spool.append([b'{"n": 1}'])

    assert read(path).splitlines() == numbered(2)
    await spool.close()


async def test_a_disk_that_hangs_keeps_nobody_waiting(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = await Spool.open(path, MAX_BYTES, deadline_seconds=0.05)
    released = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda fd: released.wait(5))

    with pytest.raises(RecordNotKept, match=r"longer than 0\.05 s"):
        await spool.append(numbered(1))

    released.set()
    await spool.close()


async def test_a_failed_drain_goes_on_where_it_stopped(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 20)
    await spool.append(numbered(6))
    sink = Sink()
    sink.fails_after = 4

    with pytest.raises(ConnectionError):
        await spool.drain(sink)
    assert spool.lines == 2

    sink.fails_after = None
    assert await spool.drain(sink) == 2
    assert sink.lines == numbered(6)


async def test_a_drain_that_was_cancelled_sends_again(spool: Spool) -> None:
    await spool.append(numbered(2))
    sink = Sink()

    async def hang(lines: Sequence[bytes]) -> None:
        await sink(lines)
        await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(spool.drain(hang), 0.05)
    await spool.drain(sink)

    assert sink.lines == numbered(2) * 2
    assert spool.lines == 0


async def test_a_line_that_arrives_during_a_drain_is_not_cut_off(spool: Spool) -> None:
    await spool.append([b'{"n": 0}'])
    sink = Sink()

    async def send(lines: Sequence[bytes]) -> None:
        await sink(lines)
        if len(sink.lines) == 1:
            await spool.append([b'{"n": 1}'])

    assert await spool.drain(send) == 2

    assert sink.lines == numbered(2)


async def test_a_line_longer_than_what_is_read_at_once_is_sent_whole(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 10)
    sink = Sink()
    await spool.append([b"x" * 100, b"y"])

    await spool.drain(sink)

    assert sink.lines == [b"x" * 100, b"y"]


async def test_a_second_owner_is_refused(spool: Spool, path: Path) -> None:
    with pytest.raises(ConfigurationError, match="another running service"):
        await Spool.open(path, MAX_BYTES)

    await spool.append(numbered(1))
    assert spool.lines == 1


async def test_a_file_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigurationError, match="cannot be used"):
        await Spool.open(tmp_path / "file" / "spool", MAX_BYTES)
