"""What ``sluicegate policy publish`` does, against the state that the settings name."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from service.audit import Audit
from service.command_state import opened
from service.errors import ConfigurationError
from service.policy import read_policy
from service.policy_store import PolicyStore
from service.settings import Settings

AUTHOR: Final = "command line"


async def publish(settings: Settings, file: Path, note: str, expected: int | None) -> str:
    """Puts a policy file into force where policies are published; returns its ``id@revision``.

    ``expected`` is the revision that it replaces; None for whichever is in force.
    """
    if settings.policy_source == "file":
        raise ConfigurationError(
            "policies come from files here: name the file with policy, or set"
            " policy_source: store to publish it"
        )
    identity, text = _read(file)
    async with opened(settings) as state:
        store, audit = PolicyStore(state), Audit(state)
        if expected is None:
            heads = (await store.stored()).heads
            expected = next((head.revision for head in heads if head.id == identity), 0)
        await audit.add(None, "publish_policy", [identity])
        number = await store.publish(text, AUTHOR, note, expected)
        label = f"{identity}@{number}"
        await audit.add(None, "published", [label])
    return label


def _read(file: Path) -> tuple[str, str]:
    """The id and the text. What is wrong is said with the file's name, which the store has not."""
    return read_policy(file).id, file.read_text(encoding="utf-8")
