"""The policies that are in force: one for everybody, others for keys that name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from service.errors import ConfigurationError
from service.policy import Policy, read_policy


class Policies:
    """Looks policies up by id. What is read once by a request holds for all of it."""

    def __init__(self, default: Policy, others: Sequence[Policy] = ()) -> None:
        self._default = default
        self._by_id: Mapping[str, Policy] = {one.id: one for one in (*others, default)}

    @property
    def default(self) -> Policy:
        """The policy of whoever has no other."""
        return self._default

    @property
    def label(self) -> str:
        """``id@revision`` of the default as last known, for logs and metrics."""
        return self._default.label

    def named(self, identity: str | None) -> Policy:
        """The policy of this id. One that is not there (any more) is the default: a key must not
        become free of every rule because a file was renamed.
        """
        return self._by_id.get(identity, self._default) if identity else self._default


def read_policies(default: Path | None, others: Sequence[Path]) -> Policies:
    """Policies from files. Raises ``ConfigurationError``, also where two have one id."""
    read = [read_policy(path) for path in others]
    policy = read_policy(default) if default else Policy()
    seen: set[str] = set()
    for one in (policy, *read):
        if one.id in seen:
            raise ConfigurationError(
                f"two policies have the id {one.id}: give each file an id of its own"
            )
        seen.add(one.id)
    return Policies(policy, read)
