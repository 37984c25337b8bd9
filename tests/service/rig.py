"""A runtime before a fake upstream, without a server: requests in, replies out."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from service.body import dumps, parse_object
from service.caller import Caller
from service.chat import ChatDialect
from service.exchange import Dialect
from service.policy import Policy
from service.records import Record
from service.replies import Incoming, Reply
from service.runtime import Runtime, open_runtime
from service.settings import Settings
from tests.fake_upstream import Answer, FakeUpstream
from tests.guards import WordGuard

CHAT = ChatDialect()
SAFE, BAD, GRAVE = "a fine day", "minor-insulting_behavior here", "severe-violence here"
REFUSAL = "I can't help with that."


class Rig:
    """A runtime before a fake upstream."""

    def __init__(self, runtime: Runtime, fake: FakeUpstream) -> None:
        self.runtime = runtime
        self.fake = fake

    async def send(self, prompt: str = SAFE, **more: Any) -> Reply:
        """A chat with one user turn."""
        return await self.ask(CHAT, {"messages": [{"role": "user", "content": prompt}], **more})

    async def ask(self, dialect: Dialect, body: dict[str, Any], **options: Any) -> Reply:
        """A request in any dialect; ``options`` are fields of ``Incoming``."""
        return await self.send_raw(dumps({"model": "m", **body}).encode(), dialect, **options)

    async def send_raw(
        self,
        raw: bytes,
        dialect: Dialect = CHAT,
        headers: dict[str, str] | None = None,
        **options: Any,
    ) -> Reply:
        """A request of these bytes; a stream is read to its end."""
        reply = await self.begin(raw, dialect, headers, **options)
        if reply.stream is None:
            return reply
        return replace(reply, body=b"".join([piece async for piece in reply.stream]), stream=None)

    async def begin(
        self,
        raw: bytes,
        dialect: Dialect = CHAT,
        headers: dict[str, str] | None = None,
        **options: Any,
    ) -> Reply:
        """The reply as it is when it begins."""
        policy = self.runtime.policies.default
        incoming = Incoming(
            "id1", dialect.path, raw, parse_object(raw), headers or {}, Caller(policy), **options
        )
        return await self.runtime.gateway.handle(dialect, incoming)

    def answers(self, *answers: Answer) -> None:
        """What the upstream answers, in order."""
        self.fake.answers = list(answers)

    async def records(self) -> list[Record]:
        """All records, oldest first."""
        return list(reversed(await self.runtime.keeper.recorder.recent(100)))

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric; 0 where it was never counted."""
        return self.runtime.metrics.registry.get_sample_value(f"sluicegate_{name}", labels) or 0.0


MakeRig = Callable[..., AbstractAsyncContextManager[Rig]]


@asynccontextmanager
async def open_rig(
    directory: Path, policy: Policy | None = None, guard: Any = None, **settings: Any
) -> AsyncIterator[Rig]:
    """A rig whose data lies in ``directory``."""
    file = None
    if policy is not None:
        file = directory / "policy.yaml"
        values = policy.model_dump(mode="json")
        for rule, shown in zip(policy.rules, values["rules"], strict=True):
            shown |= {"action": rule.action.label, "severity": rule.severity.label}
        file.write_text(json.dumps(values), "utf-8")
    async with FakeUpstream() as fake:
        made = Settings(
            upstream=settings.pop("upstream", fake.url),
            data_directory=directory / "data",
            policy=file,
            **settings,
        )
        async with open_runtime(made, guard or WordGuard()) as runtime:
            yield Rig(runtime, fake)


def content(reply: Reply, choice: int = 0) -> str | None:
    """What a choice of a chat says."""
    message: dict[str, str | None] = json.loads(reply.body)["choices"][choice]["message"]
    return message["content"]


def shown(reply: Reply) -> tuple[str, str]:
    """The outcome and the attempts that a reply tells."""
    headers = dict(reply.headers)
    return headers["x-sluicegate-outcome"], headers["x-sluicegate-attempts"]
