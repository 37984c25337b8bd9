"""nginx as a reverse proxy, to be measured against."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

from benchmarks import measure


async def nginx(
    stack: ExitStack, directory: Path, upstream: int, *, buffers: bool = True
) -> tuple[int, int] | None:
    """Port and process id of one worker with kept connections, on the service's core; None where
    nginx is not installed. Unless it ``buffers``, each read is passed on at once.
    """
    command = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if command is None:
        return None
    port, log = measure.free_port(), directory / "nginx.log"
    config = directory / "nginx.conf"
    config.write_text(
        f"""
daemon off; worker_processes 1; pid {directory}/nginx.pid; error_log {log};
events {{ worker_connections 512; }}
http {{
  access_log off; client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxied;
  fastcgi_temp_path {directory}/f; uwsgi_temp_path {directory}/u; scgi_temp_path {directory}/s;
  keepalive_requests 1000000;
  upstream model {{ server 127.0.0.1:{upstream}; keepalive 64; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://model; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering {"on" if buffers else "off"};
    }}
  }}
}}
"""
    )
    process = stack.enter_context(
        measure.started([command, "-c", config, "-p", directory], log, core=measure.SERVICE_CORE)
    )
    await measure.answers(process, port, "/v1/models", log)
    return port, process.pid
