"""A service whose policy is published while it runs, and whose records people review."""

import asyncio
import json
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from service import key_command
from service.errors import ConfigurationError
from service.policy import Action, Policy, Rule
from service.settings import load
from tests.service.conftest import StartServer
from tests.service.rig import GRAVE, REFUSAL, SAFE, MakeRig, content

LAX = Policy(id="house", rules=(Rule(action=Action.ALLOW),))
STRICT = json.dumps({"version": 1, "id": "house", "rules": [{"action": "block"}]})


async def test_a_published_policy_holds_for_the_next_request_and_after_a_restart(
    make_rig: MakeRig,
) -> None:
    async with make_rig(LAX, policy_source="store") as rig:
        assert content(await rig.send(SAFE)) != REFUSAL
        runtime = rig.runtime

        await runtime.policy_store.publish(STRICT, "ann", expected_revision=1)
        await runtime.policies.refresh()  # type: ignore[attr-defined]

        assert content(await rig.send(SAFE)) == REFUSAL
        assert (await rig.records())[-1].policy == "house@2"
        assert rig.metric("policy_reloads_total", result="swapped") == 2
        built = {"version": version("sluicegate"), "guard": runtime.guard.id}
        assert rig.metric("build_info", **built, policy="house@2") == 1
        assert rig.metric("build_info", **built, policy="house@1") == 0

    async with make_rig(LAX, policy_source="store") as rig:
        assert content(await rig.send(SAFE)) == REFUSAL


async def test_what_reviewers_decide_is_counted_and_exported(make_rig: MakeRig) -> None:
    keeping = Policy(record={"text": "full"})  # type: ignore[arg-type]
    async with make_rig(keeping) as rig:
        await rig.send(GRAVE)
        (record,) = await rig.records()
        reviews = rig.runtime.reviews

        await reviews.add(record, "policy")
        await reviews.resolve(record.id, "ann", "overturned", "none")

        assert rig.metric("review_decisions_total", outcome="overturned") == 1
        assert rig.metric("review_decisions_total", outcome="confirmed") == 0
        (line,) = [line async for line in rig.runtime.labels.export(None)]
        assert json.loads(line)["prompt"] == GRAVE
        assert json.loads(line)["unsafe"] is False


def test_a_default_is_named_only_where_policies_are_published(tmp_path: Path) -> None:
    assert load(None, {"policy_source": "store", "policy_id": "house"}).policy_id == "house"
    with pytest.raises(ConfigurationError, match="policy_source"):
        load(None, {"policy_id": "house", "data_directory": tmp_path})


async def _keys(place: Path, *roles: str) -> dict[str, dict[str, str]]:
    """Headers of a key of each role."""
    settings = load(None, {"data_directory": place})
    return {
        role: {"authorization": f"Bearer {await key_command.create(settings, role, [role])}"}
        for role in roles
    }


def test_each_role_does_its_own_over_http(start_server: StartServer) -> None:
    rules = [{"severity": "minor", "action": "block", "review": True}, {"action": "allow"}]
    policy = {"version": 1, "id": "house", "rules": rules, "record": {"text": "full"}}
    server = start_server(policy=policy, policy_source="store", require_keys=True)
    place, client = server.runtime.settings.data_directory, server.client()
    roles = ("caller", "viewer", "reviewer", "publisher")
    as_ = asyncio.run(_keys(place, *roles))

    def status(method: str, path: str, role: str, body: object = None) -> int:
        # A new key is known within about a second.
        for _ in range(100):
            answer = client.request(method, path, headers=as_[role], json=body)
            if answer.status_code != 401:
                return answer.status_code
            time.sleep(0.05)
        raise AssertionError("a key is not known")

    published = {"text": json.dumps(policy), "expected_revision": 1}
    for method, path, body, allowed in (
        ("GET", "/v1/policies", None, "viewer"),
        ("GET", "/v1/policies/house", None, "viewer"),
        ("PUT", "/v1/policies/house", published, "publisher"),
        ("POST", "/v1/policies/house/rollback", {"revision": 1}, "publisher"),
        ("GET", "/v1/reviews", None, "reviewer"),
    ):
        for role in roles:
            assert status(method, path, role, body) == (200 if role == allowed else 403)
    assert status("POST", "/v1/moderations", "caller", {"input": GRAVE}) == 200

    for _ in range(200):
        waiting = client.get("/v1/reviews", headers=as_["reviewer"]).json()
        if waiting["data"]:
            break
        time.sleep(0.05)
    (item,) = waiting["data"]
    assert (item["policy"], item["level"]) == ("house@3", "severe")
    decision = {"outcome": "overturned", "severity": "none"}
    assert status("POST", f"/v1/reviews/{item['id']}/decision", "reviewer", decision) == 200
    assert server.sample("review_decisions_total", outcome="overturned") == 1
