"""Where records wait on the disk while Redis is away: JSON lines, synced, bounded.

One file, appended to and read from the front; it is cut to nothing once all of it was sent. The
place reached lives only in memory, so after a crash the whole file is sent again: receivers drop
what they have by its id.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from service.errors import ConfigurationError, RecordNotKept

CHUNK_BYTES: Final = 256 * 1024
"""About how much is read, and sent, at once."""

logger = logging.getLogger(__name__)

T = TypeVar("T")
Waiter = tuple[bytes, int, asyncio.Future[None]]


class Spool:
    """An append-only file of lines. Made by ``open``; one owner, and one event loop.

    Everything that touches the disk runs in one worker thread, in order.
    """

    def __init__(
        self, file: _File, worker: ThreadPoolExecutor, max_bytes: int, deadline_seconds: float
    ) -> None:
        self._file = file
        self._worker = worker
        self._max_bytes = max_bytes
        self._deadline_seconds = deadline_seconds
        self._waiting: list[Waiter] = []
        self._waiting_bytes = 0
        self._flusher: asyncio.Task[None] | None = None
        self._draining = asyncio.Lock()

    @classmethod
    async def open(cls, path: Path, max_bytes: int, *, deadline_seconds: float = 5.0) -> Spool:
        """Opens or makes the file, and drops a half line that a crash left at its end.

        Raises ``ConfigurationError`` where the file cannot be used or another service has it.
        """
        worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spool")
        try:
            file = await asyncio.get_running_loop().run_in_executor(worker, _File, path)
        except OSError as error:
            worker.shutdown(wait=False)
            if isinstance(error, BlockingIOError):
                reason = "belongs to another running service: give this one another data_directory"
            else:
                reason = f"cannot be used: {error.strerror}"
            raise ConfigurationError(f"spool: {path} {reason}") from error
        if file.is_torn:
            logger.warning("%s ended in half a line, as a crash leaves it: it is dropped", path)
        return cls(file, worker, max_bytes, deadline_seconds)

    @property
    def lines(self) -> int:
        """Lines that wait to be sent."""
        return self._file.lines

    @property
    def size_bytes(self) -> int:
        """Bytes on the disk and on their way to it."""
        return self._file.size + self._waiting_bytes

    @property
    def filled(self) -> float:
        """How much of what it may hold, 0 to 1."""
        return self.size_bytes / self._max_bytes

    async def append(self, lines: Sequence[bytes]) -> None:
        """Returns when the lines are on the disk; lines that wait together share one sync.

        Raises ``RecordNotKept`` where the spool is full, the disk fails, or it takes longer than
        the deadline (then the lines may still arrive).
        """
        blob = b"".join(line + b"\n" for line in lines)
        if self.size_bytes + len(blob) > self._max_bytes:
            raise RecordNotKept(
                f"the record spool is full ({self._max_bytes} bytes) and state is unavailable:"
                " bring Redis back, or raise the spool's size"
            )
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append((blob, len(lines), waiter))
        self._waiting_bytes += len(blob)
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush())
        try:
            async with asyncio.timeout(self._deadline_seconds):
                await waiter
        except TimeoutError:
            raise RecordNotKept(
                f"the record spool's disk took longer than {self._deadline_seconds:g} s:"
                " look at the disk of data_directory"
            ) from None

    async def drain(self, send: Callable[[Sequence[bytes]], Awaitable[None]]) -> int:
        """Sends every line in order, at least once; returns how many were sent.

        Lines count as sent when ``send`` returned. What it raises is passed on, and the next
        drain goes on from the same place.
        """
        sent = 0
        async with self._draining:
            while chunk := await self._in_worker(self._file.read):
                lines = chunk.split(b"\n")[:-1]
                await send(lines)
                await self._in_worker(self._file.forget, len(chunk), len(lines))
                sent += len(lines)
        return sent

    async def close(self) -> None:
        """Waits for what is being written, and gives the file free."""
        if self._flusher is not None:
            await self._flusher
        await self._in_worker(self._file.close)
        self._worker.shutdown(wait=False)

    async def _flush(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting, []
            blob = b"".join(part for part, _, _ in group)
            lines = sum(count for _, count, _ in group)
            failure: RecordNotKept | None = None
            try:
                await self._in_worker(self._file.append, blob, lines)
            except OSError as error:
                failure = RecordNotKept(f"the record spool cannot be written: {error.strerror}")
                failure.__cause__ = error
            self._waiting_bytes -= len(blob)
            for _, _, waiter in group:
                # Done already where its caller waited too long or was cancelled.
                if waiter.done():
                    continue
                if failure is None:
                    waiter.set_result(None)
                else:
                    waiter.set_exception(failure)

    async def _in_worker(self, call: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, call, *arguments)


class _File:
    """The file, for one thread.

    ``size`` is the length of what is known to be whole and synced, ``lines`` how many of its lines
    were not sent yet.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.lines, self.size = self._scan()
            self._sent = 0
            self.is_torn = os.fstat(self._fd).st_size > self.size
            _sync_directory(path.parent)
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, blob: bytes, lines: int) -> None:
        # A crash or a full disk left half a line behind the whole ones; it must not join these.
        os.ftruncate(self._fd, self.size)
        rest = memoryview(blob)
        place = self.size
        while rest:
            written = os.pwrite(self._fd, rest, place)
            rest, place = rest[written:], place + written
        os.fsync(self._fd)
        self.size = place
        self.lines += lines

    def read(self) -> bytes:
        """The next whole lines, about ``CHUNK_BYTES`` of them; empty at the end."""
        wanted = CHUNK_BYTES
        while self._sent < self.size:
            chunk = os.pread(self._fd, min(wanted, self.size - self._sent), self._sent)
            end = chunk.rfind(b"\n") + 1
            if end or not chunk:
                return chunk[:end]
            wanted *= 2
        return b""

    def forget(self, sent: int, lines: int) -> None:
        """Goes on past what was sent, and empties the file when that was the last of it."""
        self._sent += sent
        self.lines -= lines
        if self._sent == self.size:
            os.ftruncate(self._fd, 0)
            self._sent = self.size = 0

    def close(self) -> None:
        os.close(self._fd)

    def _scan(self) -> tuple[int, int]:
        """How many whole lines there are, and where the last one ends."""
        lines = end = place = 0
        while chunk := os.pread(self._fd, CHUNK_BYTES, place):
            lines += chunk.count(b"\n")
            if (last := chunk.rfind(b"\n")) >= 0:
                end = place + last + 1
            place += len(chunk)
        return lines, end


def _sync_directory(path: Path) -> None:
    """Makes a new file's name as durable as its bytes."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
