"""A copy in memory of something that all replicas share, and that seldom changes.

A counter in Redis says whether it did. It is asked for every second or so, and all is read again
when it moved; so who uses the copy waits for nothing, and a change holds everywhere in about a
second.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

from service.errors import StateUnavailable

T = TypeVar("T")

_WHOLE_SECONDS: Final = 60.0
"""All is read so often, whatever the counter says: a fail-over may have set it back."""

logger = logging.getLogger(__name__)


class FreshCopy(Generic[T]):
    """``changes`` asks for the counter, ``read`` for it and all the rest; ``what`` is for the log.

    Both may raise ``StateUnavailable``; the copy then stays as it was, and grows old.
    """

    def __init__(
        self,
        what: str,
        changes: Callable[[], Awaitable[bytes]],
        read: Callable[[], Awaitable[tuple[bytes, T]]],
        refresh_seconds: float = 1.0,
    ) -> None:
        self.value: T | None = None
        """What was read last; None where nothing ever was. It is swapped, never changed."""
        self._what = what
        self._changes = changes
        self._read = read
        self._refresh_seconds = refresh_seconds
        self._counter = b""
        self._whole = float("-inf")
        self._confirmed = float("-inf")
        self._is_failing = False
        self._refreshing = asyncio.Lock()
        self._refresher: asyncio.Task[None] | None = None

    @property
    def age_seconds(self) -> float:
        """Since Redis last confirmed the copy; infinite where there is none."""
        return time.monotonic() - self._confirmed

    @property
    def is_kept_fresh(self) -> bool:
        """Whether it was started."""
        return self._refresher is not None

    async def start(self) -> None:
        """Reads if Redis can be asked, and begins to refresh."""
        await self.try_refresh()
        self._refresher = asyncio.create_task(self._refresh_for_ever())

    async def close(self) -> None:
        """Refreshes no longer."""
        if self._refresher is not None:
            self._refresher.cancel()
            await asyncio.gather(self._refresher, return_exceptions=True)

    async def refresh(self) -> None:
        """Brings the copy up to date. Raises ``StateUnavailable``."""
        async with self._refreshing:
            asked = time.monotonic()
            is_due = self.value is None or asked - self._whole >= _WHOLE_SECONDS
            if is_due or await self._changes() != self._counter:
                self._counter, self.value = await self._read()
                self._whole = asked
            self._confirmed = asked

    async def try_refresh(self) -> None:
        """The same, but what goes wrong is logged: the last copy serves on."""
        try:
            await self.refresh()
        except StateUnavailable as error:
            logger.debug("%s were not refreshed: %s", self._what, error)
        # Whatever it was, it is tried again, and told once.
        except Exception:
            level = logging.DEBUG if self._is_failing else logging.ERROR
            logger.log(level, "%s were not refreshed", self._what, exc_info=True)
            self._is_failing = True
        else:
            self._is_failing = False

    async def _refresh_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_seconds)
            await self.try_refresh()
