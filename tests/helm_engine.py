"""Renders the chart with Helm's own engine and checks each object against Kubernetes' schema.

Run by tests/test_helm.py with a Python that has helm-sdkpy, as `helm_engine.py CHART VALUES_JSON`.
Prints one JSON object: `objects` and `notes`, or `error`.

helm-sdkpy installs but cannot only render, so the chart is installed into an API server that
accepts everything and keeps nothing.
"""

import asyncio
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import helm_sdkpy
import kubernetes_validate
import yaml

KUBERNETES = "1.33"
NAMESPACE = "moderation"
GROUPS = {
    "v1": {
        "ConfigMap": "configmaps",
        "Secret": "secrets",
        "Service": "services",
        "ServiceAccount": "serviceaccounts",
    },
    "apps/v1": {"Deployment": "deployments"},
}


class ApiServer(BaseHTTPRequestHandler):
    """Discovery of the kinds in GROUPS; every object is absent, and every write is echoed."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/version":
            major, minor = KUBERNETES.split(".")
            self.answer(200, {"major": major, "minor": minor, "gitVersion": f"v{KUBERNETES}.0"})
        elif path == "/api":
            self.answer(200, {"kind": "APIVersions", "versions": ["v1"]})
        elif path == "/apis":
            self.answer(200, {"kind": "APIGroupList", "apiVersion": "v1", "groups": self.groups()})
        elif path.removeprefix("/apis/").removeprefix("/api/") in GROUPS:
            version = path.removeprefix("/apis/").removeprefix("/api/")
            resources = [
                {
                    "name": name,
                    "singularName": kind.lower(),
                    "namespaced": True,
                    "kind": kind,
                    "verbs": ["create", "get", "list", "patch", "update"],
                }
                for kind, name in GROUPS[version].items()
            ]
            self.answer(
                200,
                {"kind": "APIResourceList", "groupVersion": version, "resources": resources},
            )
        elif path.endswith("/secrets"):
            # Helm keeps its releases in Secrets: there are none.
            self.answer(200, {"kind": "SecretList", "apiVersion": "v1", "items": []})
        else:
            missing = {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}
            self.answer(404, {"apiVersion": "v1", "message": f"{path} not found", **missing})

    def do_POST(self) -> None:
        # Helm sends some objects as protobuf, so the bytes go back as they came.
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.send(201, self.headers["Content-Type"], content)

    do_PUT = do_POST
    do_PATCH = do_POST

    def groups(self) -> list[dict[str, Any]]:
        versions = [name.split("/") for name in GROUPS if "/" in name]
        listed = []
        for group, version in versions:
            served = {"groupVersion": f"{group}/{version}", "version": version}
            listed.append({"name": group, "versions": [served], "preferredVersion": served})
        return listed

    def answer(self, status: int, body: dict[str, Any]) -> None:
        self.send(status, "application/json", json.dumps(body).encode())

    def send(self, status: int, media_type: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing: standard output is for the result."""


def render(chart: str, values: dict[str, Any]) -> dict[str, Any]:
    """The chart's objects and notes, or Helm's or Kubernetes' complaint as `error`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), ApiServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cluster = {"server": f"http://127.0.0.1:{server.server_port}"}
    configuration = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "fake", "cluster": cluster}],
        "users": [{"name": "fake", "user": {}}],
        "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
        "current-context": "fake",
    }
    try:
        with helm_sdkpy.Configuration(NAMESPACE, yaml.safe_dump(configuration)) as helm:
            install = helm_sdkpy.Install(helm)
            release = asyncio.run(install.run("guard", chart, values, wait=False, timeout=30))
        objects = [item for item in yaml.safe_load_all(release["manifest"]) if item]
        for item in objects:
            kubernetes_validate.validate(item, KUBERNETES, strict=True)
    except (helm_sdkpy.HelmError, kubernetes_validate.ValidationError) as error:
        return {"error": str(error)}
    finally:
        server.shutdown()
    return {"objects": objects, "notes": release["info"]["notes"]}


if __name__ == "__main__":
    print(json.dumps(render(sys.argv[1], json.loads(sys.argv[2]))))
