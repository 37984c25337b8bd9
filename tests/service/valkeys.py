"""Real Valkey servers with a port: a primary with a replica and a Sentinel, a cluster, TLS."""

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from service.private_valkey import server_binary

_PATIENCE = 30.0
"""Seconds after which a test that would hang fails."""


class Server:
    """A server process on a port of loopback."""

    def __init__(self, port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.port = port
        self.process = process
        self.log = log

    async def command(self, *parts: str | int) -> Any:
        """The answer to one command."""
        async with Redis(port=self.port, protocol=2) as redis:
            return await redis.execute_command(*parts)  # type: ignore[no-untyped-call]

    def kill(self) -> None:
        """Ends it as a crash would."""
        self.process.kill()
        self.process.wait()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """It hangs within the block."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


@contextmanager
def started(directory: Path, *arguments: str, **settings: str | int) -> Iterator[Server]:
    """A server with ``settings``; ``arguments`` come before them."""
    directory.mkdir(exist_ok=True)
    port = free_port()
    log = directory / "log"
    made = {
        "port": port,
        "bind": "127.0.0.1",
        "dir": directory,
        "save": "",
        "appendonly": "no",
    } | {name.replace("_", "-"): value for name, value in settings.items()}
    if arguments:
        del made["save"], made["appendonly"]
    words = [str(word) for name, value in made.items() for word in (f"--{name}", value)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(server_binary()), *arguments, *words],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = Server(port, process, log)
    try:
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGCONT)
        server.kill()


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Returns when ``condition`` holds; a server that does not answer yet is asked again."""
    async with asyncio.timeout(_PATIENCE):
        while True:
            with contextlib.suppress(RedisError, OSError):
                if await condition():
                    return
            await asyncio.sleep(0.02)


def free_port() -> int:
    """A port that nobody listens on now, nor on the one for a cluster's own talk."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def watched(directory: Path) -> AsyncIterator[tuple[Server, Server, Server]]:
    """A primary, its replica, and the Sentinel that watches them as ``main``."""
    with contextlib.ExitStack() as stack:
        primary = stack.enter_context(started(directory / "primary", repl_diskless_sync_delay=0))
        replica = stack.enter_context(
            started(
                directory / "replica",
                replicaof=f"127.0.0.1 {primary.port}",
                repl_diskless_sync_delay=0,
            )
        )

        async def is_linked() -> bool:
            return b"master_link_status:up" in await _info(replica)

        async def knows_both() -> bool:
            seen = await sentinel.command("SENTINEL", "REPLICAS", "main")
            words = [{_bytes(word) for word in one} for one in seen]
            # Before it has heard that the link is well it would not promote the replica.
            return any({str(replica.port).encode(), b"ok"} <= of_one for of_one in words)

        await until(is_linked)
        configuration = directory / "sentinel.conf"
        configuration.write_text(
            f"sentinel monitor main 127.0.0.1 {primary.port} 1\n"
            "sentinel down-after-milliseconds main 300\n"
            "sentinel failover-timeout main 2000\n"
        )
        sentinel = stack.enter_context(
            started(directory / "sentinel", str(configuration), "--sentinel")
        )
        await until(knows_both)
        yield primary, replica, sentinel


async def _info(server: Server) -> bytes:
    async with Redis(port=server.port, protocol=2) as redis:
        answer = await redis.info("replication")
    return b"\n".join(f"{key}:{value}".encode() for key, value in answer.items())


def _bytes(word: Any) -> bytes:
    return word if isinstance(word, bytes) else str(word).encode()


@asynccontextmanager
async def cluster(directory: Path, nodes: int) -> AsyncIterator[list[Server]]:
    """A cluster of so many nodes, each with an equal share of the slots."""
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(
                started(
                    directory / str(number),
                    cluster_enabled="yes",
                    cluster_port=free_port(),
                    cluster_node_timeout=2000,
                )
            )
            for number in range(nodes)
        ]
        for number, server in enumerate(servers):
            await until(lambda server=server: _answers(server))  # type: ignore[misc]
            first, last = 16384 * number // nodes, 16384 * (number + 1) // nodes - 1
            await server.command("CLUSTER", "ADDSLOTSRANGE", first, last)
            await server.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for server in servers[1:]:
            port = (await server.command("CONFIG", "GET", "cluster-port"))[1]
            await servers[0].command("CLUSTER", "MEET", "127.0.0.1", server.port, int(port))
        for server in servers:
            await until(lambda server=server: _is_covered(server))  # type: ignore[misc]
        yield servers


@asynccontextmanager
async def standing_by(directory: Path, primary: Server) -> AsyncIterator[Server]:
    """A replica that takes the place of this node of a cluster when it is gone."""
    with started(
        directory,
        cluster_enabled="yes",
        cluster_port=free_port(),
        cluster_node_timeout=2000,
        repl_diskless_sync_delay=0,
    ) as replica:
        await until(lambda: _answers(replica))
        port = (await primary.command("CONFIG", "GET", "cluster-port"))[1]
        await replica.command("CLUSTER", "MEET", "127.0.0.1", primary.port, int(port))
        name = await primary.command("CLUSTER", "MYID")

        async def follows() -> bool:
            # Refused until it has heard of all the others.
            await replica.command("CLUSTER", "REPLICATE", name)
            return True

        async def is_linked() -> bool:
            return b"master_link_status:up" in await _info(replica)

        await until(follows)
        await until(is_linked)
        yield replica


async def _answers(server: Server) -> bool:
    return bool(await server.command("PING"))


async def _is_covered(server: Server) -> bool:
    async with Redis(port=server.port, protocol=2) as redis:
        answer = await redis.execute_command("CLUSTER INFO")  # type: ignore[no-untyped-call]
    return (
        b"cluster_state:ok" in answer
        if isinstance(answer, bytes)
        else (answer.get("cluster_state") == "ok")
    )


def certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, which is its own authority, and its key."""
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
            *("-out", str(certificate), "-keyout", str(key)),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


@asynccontextmanager
async def behind_tls(directory: Path, socket_path: str) -> AsyncIterator[tuple[int, Path]]:
    """A port that speaks TLS for the server at ``socket_path``, and its certificate.

    The server that is at hand was built without TLS, so TLS ends before it, as at many hosts.
    """
    file, key = certificate(directory)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, key)

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(socket_path)
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    server = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1], file
