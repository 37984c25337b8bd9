"""A circuit breaker: after failures in a row a server is left alone, then tried. Pure.

closed ── failures in a row ──▶ open ── seconds passed ──▶ one trial ── success ──▶ closed
                                 ▲                             └────── failure ──┐
                                 └──────────────────────────────────────────────┘
"""

from __future__ import annotations

import math
from typing import Final

_TRIAL_SECONDS: Final = 1.0
"""So long a trial keeps others out: an answer may take minutes, and the next call tells as much."""


class Breaker:
    """Opens after ``failures`` in a row, for ``seconds``. Times are in seconds of any one clock."""

    def __init__(self, failures: int, seconds: float) -> None:
        self._most = failures
        self._seconds = seconds
        self._failures = 0
        self._opened: float | None = None
        self._tried = -math.inf
        """When a trial began of which nothing is known yet."""

    @property
    def is_closed(self) -> bool:
        """Whether calls pass as usual."""
        return self._opened is None

    def remaining(self, now: float) -> float:
        """Seconds until a call may pass; 0 where one may now, which then is the trial."""
        if self._opened is None:
            return 0.0
        left = self._opened + self._seconds - now
        if left > 0:
            return left
        if now - self._tried < _TRIAL_SECONDS:
            return self._tried + _TRIAL_SECONDS - now
        self._tried = now
        return 0.0

    def succeeded(self) -> None:
        """A call was answered."""
        self._failures = 0
        self._opened = None
        self._tried = -math.inf

    def failed(self, now: float) -> None:
        """A call failed in a way that speaks against the server."""
        self._failures += 1
        if self._opened is not None or self._failures >= self._most:
            self._opened = now
        self._tried = -math.inf

    def abandoned(self) -> None:
        """A call ended with nothing learnt of the server, as when its client went away."""
        self._tried = -math.inf
