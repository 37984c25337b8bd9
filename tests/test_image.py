"""The container image, built from the Dockerfile as it is and run as it is meant to run."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
STORAGE = ROOT / "build" / "image"
IMAGE = "localhost/sluicegate:test"
NEEDED = ("buildah", "podman", "runc", "debootstrap")
MISSING = [program for program in NEEDED if shutil.which(program) is None]

pytestmark = [
    pytest.mark.image,
    pytest.mark.skipif(os.geteuid() != 0, reason="building and running an image needs root"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


def podman(*arguments: str) -> list[str]:
    # Works where no systemd runs, as in a container.
    runtime = ["--runtime", "runc", "--cgroup-manager", "cgroupfs", "--events-backend", "file"]
    storage = ["--root", str(STORAGE / "root"), "--runroot", str(STORAGE / "run")]
    return ["podman", *storage, *runtime, *arguments]


def run(*arguments: str) -> list[str]:
    """`podman run` as the compose file and the chart run it: read-only and without capabilities."""
    return podman(
        *("run", "--rm", "--network", "host", "--read-only", "--tmpfs", "/tmp"),  # noqa: S108
        *("--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--no-healthcheck"),
        *("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096"),
        *arguments,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def image() -> str:
    build = [str(ROOT / "scripts" / "build_image.sh"), str(STORAGE), "sluicegate:test"]
    done = subprocess.run(build, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    return IMAGE


@contextmanager
def started(*arguments: str) -> Iterator[str]:
    """The address of a running container that has answered that it is ready."""
    port, admin_port = free_port(), free_port()
    command = run(
        *("--env", f"SLUICEGATE_PORT={port}", "--env", f"SLUICEGATE_ADMIN_PORT={admin_port}"),
        *arguments,
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as container:
        try:
            wait_until_ready(f"http://127.0.0.1:{port}/health/ready", container)
            yield f"http://127.0.0.1:{port}"
        finally:
            container.terminate()
            container.communicate(timeout=30)


def wait_until_ready(url: str, container: "subprocess.Popen[bytes]") -> None:
    for _ in range(120):
        if container.poll() is not None:
            assert container.stdout is not None
            pytest.fail(container.stdout.read().decode(errors="replace")[-4000:])
        try:
            with urllib.request.urlopen(url, timeout=2):  # noqa: S310 - our own address
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.25)
    pytest.fail(f"{url} did not answer")


def moderated(address: str) -> dict[str, Any]:
    body = json.dumps({"input": "How do I sharpen a kitchen knife?"}).encode()
    request = urllib.request.Request(  # noqa: S310 - our own address
        f"{address}/v1/moderations", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310 - our own address
        answer: dict[str, Any] = json.load(response)
    return answer


def test_the_image_moderates_without_root_on_a_read_only_disk(image: str) -> None:
    with started("--env", "SLUICEGATE_ALLOW_UNAUTHENTICATED=true", image) as address:
        assert moderated(address)["results"][0]["flagged"] is False


def test_the_image_alone_asks_for_a_key(image: str) -> None:
    with started(image) as address, pytest.raises(urllib.error.HTTPError, match="401") as refused:
        moderated(address)
    refused.value.close()


def test_the_image_has_no_torch_and_no_root(image: str) -> None:
    check = "import importlib.util as u, os; print(u.find_spec('torch'), os.getuid(), os.getgid())"
    done = subprocess.run(
        run("--entrypoint", "python3", image, "-c", check),
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert (done.returncode, done.stdout.strip()) == (0, "None 10001 10001"), done.stderr
