"""Who asks, and what is granted to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from service.policy import Policy

Role = Literal["caller", "viewer", "reviewer", "publisher", "admin"]

CREDENTIALS: Final = ("authorization", "x-api-key", "api-key")
"""Headers that hold a credential: everybody's, Anthropic's, Azure's."""
UPSTREAM_KEY: Final = "x-sluicegate-upstream-key"
"""Carries a caller's upstream key to the upstream client, which sends it as the bearer. No client
can set it: headers with this beginning are dropped when a request comes in.
"""


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever sent a request; ``policy`` is the one that it keeps, whatever is published meanwhile.

    ``key_id`` is None where none was shown, which keys that are required do not allow.
    """

    policy: Policy
    key_id: str | None = None
    roles: frozenset[Role] = frozenset({"caller"})
    upstream_key: str | None = field(default=None, repr=False)
    """Sent to the upstream in place of any other."""
    name: str | None = None
    """The key's name, for people."""
    answer_headers: Mapping[str, str] = field(default_factory=dict)
    """Go with the answer: what is left of the caller's limits."""

    def has(self, role: Role) -> bool:
        """Whether it has a role; an admin has all of them."""
        return role in self.roles or "admin" in self.roles
