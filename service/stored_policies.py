"""The policies in force where they are published to Redis instead of read from files.

Requests look at a copy in memory. It is written to a file in the data directory too, so that a
service which starts while Redis is away obeys the policies that were in force before. Nothing
deletes a policy, so one that is missing in Redis was lost there: it stays in force, and a store
that is empty gets the last known ones back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from service.errors import StateUnavailable
from service.fresh_copy import FreshCopy
from service.policies import Policies
from service.policy import Policy, read_policy
from service.policy_store import VERSION, Head, PolicyStore, Revision, RevisionFormatError

FILE: Final = "policies.json"
"""In the data directory: ``version``, ``confirmed`` in seconds since 1970, ``revisions``."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Edition:
    revision: Revision
    policy: Policy


_InForce = Mapping[str, _Edition]


@dataclass(slots=True)
class PolicyCounts:
    """What became of published policies here since the start; only ever growing."""

    swapped: int = 0
    """Came into force, those of the start included."""
    unreadable: int = 0
    """Could not be read here, and left the one before in force."""


class StoredPolicies(Policies):
    """``Policies`` that are published. ``start`` it, and ``close`` it after use.

    ``default_id`` names the policy of whoever has no other; until it is published the default of
    ``seed`` is in its place. ``seed_texts``, by id, are published to a store that is empty.
    ``default`` and ``named`` raise ``StateUnavailable`` where no policies are known, or none that
    were confirmed within ``stale_seconds``: stricter ones may have been published since.
    ``swapped`` is told the label of the default when that changed.
    """

    def __init__(
        self,
        store: PolicyStore,
        directory: Path,
        seed: Policies,
        seed_texts: Mapping[str, str],
        *,
        default_id: str,
        refresh_seconds: float = 1.0,
        stale_seconds: float = 86_400.0,
        swapped: Callable[[str], None] = lambda label: None,
    ) -> None:
        self.counts = PolicyCounts()
        self._store = store
        self._file = directory / FILE
        self._seed = seed
        self._seed_texts = seed_texts
        self.default_id = default_id
        self._stale_seconds = stale_seconds
        self._swapped = swapped
        self._copy = FreshCopy("policies", store.changes, self._read, refresh_seconds)
        self._from_file: _InForce = {}
        self._file_confirmed = float("-inf")
        self._noted: set[tuple[str, int]] = set()
        self._lost: frozenset[str] = frozenset()
        self._is_file_writable = True
        # A refresh that is cancelled leaves its thread behind, which writes on.
        self._writing = threading.Lock()

    async def start(self) -> None:
        """Takes the last known from the file, reads Redis if it can, and begins to refresh."""
        self._from_file, self._file_confirmed = await asyncio.to_thread(_read_file, self._file)
        await self._copy.start()

    async def close(self) -> None:
        """Refreshes no longer."""
        await self._copy.close()

    async def refresh(self) -> None:
        """Brings what was just published into force here. Raises ``StateUnavailable``."""
        await self._copy.refresh()

    @property
    def age_seconds(self) -> float:
        """Since Redis last confirmed what is in force; infinite where nothing is known."""
        return min(self._copy.age_seconds, time.monotonic() - self._file_confirmed)

    @property
    def default(self) -> Policy:
        """See ``Policies``."""
        self._check_age()
        return self._default_of(self._in_force)

    @property
    def label(self) -> str:
        """See ``Policies``."""
        return self._default_of(self._in_force).label

    def named(self, identity: str | None) -> Policy:
        """See ``Policies``."""
        found = self._in_force.get(identity) if identity else None
        if found is None:
            return self.default
        self._check_age()
        return found.policy

    def revision_of(self, identity: str) -> int | None:
        """The revision that is obeyed here, which may be older than the one in Redis."""
        found = self._in_force.get(identity)
        return None if found is None else found.revision.revision

    @property
    def _in_force(self) -> _InForce:
        return self._from_file if self._copy.value is None else self._copy.value

    def _default_of(self, in_force: _InForce) -> Policy:
        found = in_force.get(self.default_id)
        return self._seed.default if found is None else found.policy

    def _check_age(self) -> None:
        if self.age_seconds > self._stale_seconds:
            raise StateUnavailable(
                "the policy is not known, because Redis has been away for too long"
            )

    async def _read(self) -> tuple[bytes, _InForce]:
        stored = await self._store.stored()
        known = self._in_force
        if not stored.heads and await self._fill(known):
            stored = await self._store.stored()
        found: dict[str, _Edition] = {}
        for head in stored.heads:
            edition = await self._edition(head, known.get(head.id))
            if edition is not None:
                found[head.id] = edition
        lost = frozenset(known.keys() - {head.id for head in stored.heads})
        for identity in sorted(lost - self._lost):
            logger.error("the policy %s is gone from Redis, and stays in force here", identity)
        self._lost = lost
        in_force = {**known, **found}
        await asyncio.to_thread(self._write_file, [one.revision for one in in_force.values()])
        # Last, so that a refresh that is cancelled has told nothing.
        self._tell(known, in_force)
        return stored.changes, in_force

    async def _fill(self, known: _InForce) -> bool:
        if not known:
            return await self._store.seed(self._seed_texts, "settings", "from the settings")
        texts = {name: edition.revision.text for name, edition in known.items()}
        return await self._store.seed(texts, "service", "restored: the store was empty")

    async def _edition(self, head: Head, known: _Edition | None) -> _Edition | None:
        """The newest edition that can be obeyed here: the head, or one before it."""
        try:
            return await _obeyed(Revision.from_json(head.data), known)
        except RevisionFormatError as error:
            reason = str(error)
        edition = await self._before(head, known)
        place = (head.id, head.revision)
        if place not in self._noted:
            self._noted.add(place)
            self.counts.unreadable += 1
            logger.error(
                "revision %d of the policy %s cannot be obeyed here, %s: %s",
                head.revision,
                head.id,
                "and none before it" if edition is None else f"{edition.policy.label} is",
                reason,
            )
        return edition

    async def _before(self, head: Head, known: _Edition | None) -> _Edition | None:
        for older in await self._store.before(head):
            with contextlib.suppress(RevisionFormatError):
                return await _obeyed(older, known)
        return known

    def _tell(self, known: _InForce, in_force: _InForce) -> None:
        changed = [one for name, one in in_force.items() if known.get(name) != one]
        self.counts.swapped += len(changed)
        for edition in changed:
            logger.info("the policy %s is in force", edition.policy.label)
        label = self._default_of(in_force).label
        if label != self._default_of(known).label:
            self._swapped(label)

    def _write_file(self, revisions: Sequence[Revision]) -> None:
        values = {
            "version": VERSION,
            "confirmed": time.time(),
            "revisions": [{"version": VERSION, **asdict(one)} for one in revisions],
        }
        with self._writing:
            self._replace_file(json.dumps(values))

    def _replace_file(self, content: str) -> None:
        new = self._file.with_suffix(".new")
        try:
            # Left by a service that was killed here; its mode is not to be relied upon.
            new.unlink(missing_ok=True)
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._file)
            self._is_file_writable = True
        except OSError as error:
            if self._is_file_writable:
                logger.error("%s cannot be written: %s", self._file, error.strerror)
            self._is_file_writable = False


def read_seed(default: Path | None, others: Sequence[Path]) -> dict[str, str]:
    """Texts of policy files by the policies' ids, which ``read_policies`` has checked."""
    paths = [*([default] if default else []), *others]
    return {read_policy(path).id: path.read_text(encoding="utf-8") for path in paths}


async def _obeyed(revision: Revision, known: _Edition | None) -> _Edition:
    if known is not None and known.revision == revision:
        return known
    return _Edition(revision, await asyncio.to_thread(revision.policy))


def _read_file(path: Path) -> tuple[_InForce, float]:
    """Editions, and when Redis confirmed them, by this process's own clock."""
    nothing: tuple[_InForce, float] = {}, float("-inf")
    try:
        values = json.loads(path.read_bytes())
        revisions = [Revision.from_values(one) for one in values["revisions"]]
        in_force = {one.id: _Edition(one, one.policy()) for one in revisions}
        # A clock that was set back makes nothing younger than it can be.
        age = max(0.0, time.time() - float(values["confirmed"]))
    except FileNotFoundError:
        return nothing
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("%s cannot be used: %s", path, error)
        return nothing
    return in_force, time.monotonic() - age
