"""The client of the upstream over TLS, on each of the loops, which have a TLS of their own."""

import asyncio
import json
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from service.errors import (
    ConfigurationError,
    UpstreamUnreachable,
)
from service.headers import header
from service.sse import EventParser
from service.upstream import (
    Upstream,
)
from tests.fake_upstream import (
    Answer,
    FakeUpstream,
    text,
)
from tests.service.test_upstream import (
    LIMIT,
    LONG,
    LONG_TEXT,
    UNHURRIED,
    Call,
    Run,
    both,
    client,
    post,
    stream,
)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a CA, another CA, and the CA's certificate for `localhost`."""
    directory = tmp_path_factory.mktemp("authority")

    def certify(name: str, *options: str) -> None:
        command = [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
        ]
        command += ["-noenc", "-keyout", f"{name}.key", "-out", f"{name}.pem", "-days", "2"]
        subprocess.run([*command, *options], cwd=directory, check=True, capture_output=True)

    certify("ca", "-subj", "/CN=ca")
    certify("other", "-subj", "/CN=other")
    names = ("-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=CA:FALSE")
    certify("server", "-subj", "/CN=server", "-CA", "ca.pem", "-CAkey", "ca.key", *names)
    return directory


@asynccontextmanager
async def tls_in_front_of(fake: FakeUpstream, authority: Path) -> AsyncIterator[int]:
    """The port of a server that takes TLS off for a fake."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(authority / "server.pem", authority / "server.key")
    tasks: set[asyncio.Task[None]] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind = await asyncio.open_connection("127.0.0.1", fake.url.rpartition(":")[2])
        for pair in ((reader, behind[1]), (behind[0], writer)):
            tasks.add(asyncio.create_task(copy(*pair)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
class TestTls:
    """Each of the loops has a TLS of its own."""

    def test_calls_over_one_connection(self, run: Run, authority: Path) -> None:
        async def test() -> None:
            # The third call meets a connection that is closed, and is made again.
            answers = [text(LONG_TEXT), text("Hello."), Answer(wire=b""), text("Hello.")]
            async with (
                FakeUpstream(answers) as fake,
                tls_in_front_of(fake, authority) as port,
                client(f"https://localhost:{port}", ca_file=authority / "ca.pem") as upstream,
            ):
                first, streamed, last = [await call(upstream) for call in (post, stream, post)]

            assert json.loads(first)["choices"][0]["message"]["content"] == LONG_TEXT
            assert EventParser().feed(streamed)[-1].data == "[DONE]"
            assert json.loads(last)["choices"][0]["message"]["content"] == "Hello."
            connections = [received.connection for received in fake.received]
            assert connections[0] == connections[1] == connections[2] != connections[3]
            assert header(fake.received[0].headers, "host") == f"localhost:{port}"

        run(test())

    @both
    @pytest.mark.parametrize("stall", [{"delay": LONG}, {"stall_after": 100}], ids=str)
    def test_cancelling_a_call_is_seen_by_the_upstream(
        self, run: Run, call: Call, stall: dict[str, Any], authority: Path
    ) -> None:
        async def test() -> None:
            async with (
                FakeUpstream(text("Hello.", **stall)) as fake,
                tls_in_front_of(fake, authority) as port,
                client(f"https://localhost:{port}", ca_file=authority / "ca.pem") as upstream,
            ):
                running = asyncio.ensure_future(call(upstream))
                await fake.wait_for_request()
                running.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await running
                await fake.wait_for_disconnect()

        run(test())

    @pytest.mark.parametrize(
        ("host", "trusted"),
        [("localhost", "other.pem"), ("localhost", None), ("127.0.0.1", "ca.pem")],
    )
    def test_a_certificate_that_is_not_to_be_trusted(
        self, run: Run, authority: Path, host: str, trusted: str | None
    ) -> None:
        async def test() -> None:
            ca_file = authority / trusted if trusted else None
            async with (
                FakeUpstream() as fake,
                tls_in_front_of(fake, authority) as port,
                client(f"https://{host}:{port}", ca_file=ca_file) as upstream,
            ):
                with pytest.raises(UpstreamUnreachable, match=r"\(SSLCertVerificationError\)"):
                    await post(upstream)

            assert fake.received == []

        run(test())


class TestTrust:
    def test_a_file_without_certificates(self, tmp_path: Path) -> None:
        (tmp_path / "ca.pem").write_text("none")

        for file in ("ca.pem", "missing.pem"):
            with pytest.raises(ConfigurationError, match=f"{file} cannot be used"):
                Upstream(
                    "https://h",
                    api_key=None,
                    deadlines=UNHURRIED,
                    max_body_bytes=LIMIT,
                    ca_file=tmp_path / file,
                )
