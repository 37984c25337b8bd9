"""The chart, rendered by Helm's own engine and checked against Kubernetes' schemas."""

import functools
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from service.policy import read_policy

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv-helm" / "bin" / "python"

Values = dict[str, Any]

if not PYTHON.exists():
    pytest.skip(
        "Helm's engine is not installed: make test-helm, which needs Python 3.12 or newer",
        allow_module_level=True,
    )


def run(values: Values) -> dict[str, Any]:
    """The engine's result: `objects` and `notes`, or `error`."""
    result: dict[str, Any] = json.loads(output(json.dumps(values)))
    return result


@functools.cache
def output(values: str) -> str:
    command = [str(PYTHON), str(ROOT / "tests" / "helm_engine.py"), "helm", values]
    # Helm makes folders for its caches and settings in the home directory.
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            command, cwd=ROOT, env={"HOME": home}, capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(values: Values) -> dict[str, Any]:
    """The rendered objects by kind."""
    result = run(values)
    assert "error" not in result, result["error"]
    return {item["kind"]: item for item in result["objects"]}


def container(values: Values) -> dict[str, Any]:
    pod = render(values)["Deployment"]["spec"]["template"]["spec"]
    found: dict[str, Any] = pod["containers"][0]
    return found


def environment(values: Values) -> dict[str, Any]:
    return {item["name"]: item.get("value", item) for item in container(values)["env"]}


def test_the_defaults_make_one_pod_behind_a_service() -> None:
    objects = render({})

    assert set(objects) == {"ServiceAccount", "Service", "Deployment"}
    assert objects["Deployment"]["spec"]["replicas"] == 1
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert objects["Service"]["spec"]["selector"].items() <= labels.items()
    assert objects["Service"]["spec"]["ports"][0]["port"] == 8080


def test_the_pod_may_write_only_to_its_data_and_tmp() -> None:
    pod = render({})["Deployment"]["spec"]["template"]["spec"]

    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["containers"][0]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {"/data", "/tmp"}  # noqa: S108 - a path inside the container
    assert all("emptyDir" in volume for volume in pod["volumes"])


def test_probes_ask_our_own_health_and_not_the_upstream() -> None:
    probes = container({})

    assert probes["startupProbe"]["httpGet"] == {"path": "/health/live", "port": "http"}
    assert probes["livenessProbe"]["httpGet"] == {"path": "/health/live", "port": "http"}
    assert probes["readinessProbe"]["httpGet"] == {"path": "/health/ready", "port": "http"}


def test_no_variable_of_a_service_shadows_a_setting() -> None:
    pod = render({})["Deployment"]["spec"]["template"]["spec"]

    assert pod["enableServiceLinks"] is False


def test_the_upstream_and_more_settings_reach_the_environment() -> None:
    variables = environment(
        {
            "upstream": "http://vllm:8000",
            "allowUnauthenticated": False,
            "extraEnv": [{"name": "SLUICEGATE_LOG_LEVEL", "value": "debug"}],
        }
    )

    assert variables["SLUICEGATE_UPSTREAM"] == "http://vllm:8000"
    assert variables["SLUICEGATE_LOG_LEVEL"] == "debug"
    assert "SLUICEGATE_ALLOW_UNAUTHENTICATED" not in variables


def test_the_url_of_redis_comes_from_a_secret_that_exists() -> None:
    variables = environment({"state": {"existingSecret": "redis"}})

    assert variables["SLUICEGATE_STATE_URL"]["valueFrom"] == {
        "secretKeyRef": {"name": "redis", "key": "state-url"}
    }


def test_a_policy_is_mounted_and_a_changed_one_rolls_the_pods() -> None:
    def rendered(identifier: str) -> tuple[str, str]:
        objects = render({"policy": {"version": 1, "id": identifier}})
        annotations = objects["Deployment"]["spec"]["template"]["metadata"]["annotations"]
        return objects["ConfigMap"]["data"]["policy.yaml"], annotations["checksum/policy"]

    first, first_checksum = rendered("strict")
    second, second_checksum = rendered("lenient")

    assert (first, second) == ("id: strict\nversion: 1\n", "id: lenient\nversion: 1\n")
    assert first_checksum != second_checksum
    variables = environment({"policy": {"version": 1}})
    assert variables["SLUICEGATE_POLICY"] == "/etc/sluicegate/policy.yaml"


def test_the_service_reads_the_mounted_policy(tmp_path: Path) -> None:
    rules = [
        {"direction": "prompt", "severity": "severe", "action": "block"},
        {"categories": ["violence"], "severity": "minor", "action": "annotate"},
        {"action": "allow"},
    ]
    objects = render({"policy": {"version": 1, "id": "strict", "rules": rules}})
    mounted = tmp_path / "policy.yaml"
    mounted.write_text(objects["ConfigMap"]["data"]["policy.yaml"], encoding="utf-8")

    policy = read_policy(mounted)

    assert policy.id == "strict"
    assert [rule.action.label for rule in policy.rules] == ["block", "annotate", "allow"]


def test_a_name_given_is_the_name_of_everything() -> None:
    objects = render({"fullnameOverride": "gate", "policy": {"version": 1}})

    names = {kind: item["metadata"]["name"] for kind, item in objects.items()}
    assert names == {
        "ServiceAccount": "gate",
        "ConfigMap": "gate-policy",
        "Service": "gate",
        "Deployment": "gate",
    }


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"replicas": 2}, "'replicas' not allowed"),
        ({"state": {"url": "redis://redis:6379/0"}}, "'url' not allowed"),
        ({"upstream": "vllm:8000"}, "at '/upstream'"),
        ({"replicaCount": "two"}, "at '/replicaCount'"),
        ({"service": {"port": 0}}, "at '/service/port'"),
        ({"replicaCount": 2}, "replicaCount above 1 needs state.existingSecret"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(values: Values, complaint: str) -> None:
    assert complaint in run(values)["error"]


def test_several_replicas_share_a_redis() -> None:
    objects = render({"replicaCount": 3, "state": {"existingSecret": "redis"}})

    assert objects["Deployment"]["spec"]["replicas"] == 3


def test_the_notes_say_what_is_not_set_up() -> None:
    bare = run({})["notes"]
    full = run(
        {
            "upstream": "http://vllm:8000",
            "state": {"existingSecret": "redis"},
            "allowUnauthenticated": False,
        }
    )["notes"]

    for said in ("guards no chat endpoint", "Records end with the pod", "Whoever reaches"):
        assert said in bare
        assert said not in full
