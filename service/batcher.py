"""Concurrent requests share the guard's batches.

A batch holds windows of like length up to a budget of padded tokens. Inputs take turns: each batch
serves the one whose turn it is, with whatever fits beside it, so that a long text does not keep
short ones waiting. Pieces of answers go first: a stream waits for each. The guard runs on a thread
of its own, off the event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from models.guard import COLUMNS, Guard, Logits, pack
from models.inputs import GuardInput, Window, Windows
from models.verdict import Verdict
from service.errors import GuardUnavailable, Overloaded, TooLarge

_CANDIDATES = 256
"""Windows that are looked at when a batch is formed."""

_TEXTS_A_TURN = 16
"""Texts that are encoded before others get a turn of the loop."""

_PIECE_WINDOWS = 4
"""An answer's text of up to so many windows is a piece that a stream may wait for."""

_INLINE_CHARACTERS = 4000
"""A text up to this long is encoded at once (below a millisecond); longer ones on a thread."""


@dataclass(slots=True, eq=False)
class _Job:
    """One input on its way: windows not yet scored stand in ``rest``."""

    item: GuardInput
    prepared: Windows
    logits: Logits
    rest: deque[int]
    done: asyncio.Future[Logits]
    goes_first: bool
    unscored: int = field(init=False)

    def __post_init__(self) -> None:
        self.unscored = len(self.rest)


class _Row(NamedTuple):
    """One window of a job."""

    job: _Job
    number: int
    window: Window


class Batcher:
    """Judges inputs for many callers at once.

    ``observe_batch`` is told the rows, padded tokens and seconds of each batch that was scored.
    """

    def __init__(
        self,
        guard: Guard,
        *,
        token_budget: int,
        waiting_windows: int,
        tokens_per_request: int,
        observe_batch: Callable[[int, int, float], None] = lambda *_: None,
    ) -> None:
        self.guard = guard
        self._token_budget = token_budget
        self._waiting_windows = waiting_windows
        self._tokens_per_request = tokens_per_request
        self._observe_batch = observe_batch
        self._jobs: deque[_Job] = deque()
        self._waiting = 0
        self._wake = asyncio.Event()
        self._scorer = ThreadPoolExecutor(1, thread_name_prefix="guard")
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    def start(self) -> None:
        """Begins to work; called on the event loop."""
        self._task = asyncio.create_task(self._run(), name="batcher")

    async def close(self) -> None:
        """Stops; callers that still wait get ``GuardUnavailable``."""
        self._is_closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for job in self._jobs:
            if not job.done.done():
                job.done.set_exception(GuardUnavailable("the service is stopping: try again"))
        self._scorer.shutdown(wait=False, cancel_futures=True)
        self._encoder.shutdown(wait=False, cancel_futures=True)

    @property
    def waiting(self) -> int:
        """Windows that no batch has taken yet."""
        return self._waiting

    async def judge(self, items: Sequence[GuardInput], *, is_answer: bool = False) -> list[Verdict]:
        """Verdicts on ``items``, in their order.

        They must find room among what waits, unless they are of an answer, which was paid for
        already. Raises ``TooLarge`` and, where there is
        no room, ``Overloaded`` before anything is judged, ``GuardUnavailable`` if
        an input could not be. A caller that is cancelled takes its windows out of the queue.
        """
        if self._is_closed:
            raise GuardUnavailable("the service is stopping: try again")
        prepared = []
        for number, item in enumerate(items, 1):
            if len(item.text) <= _INLINE_CHARACTERS:
                prepared.append(self.guard.prepare(item))
            else:
                prepared.append(await self._prepare(item))
            if number % _TEXTS_A_TURN == 0:
                # Thousands of short texts would keep everyone else from the loop.
                await asyncio.sleep(0)
        self._check_size(prepared)
        if not is_answer:
            self._check_room(prepared)
        loop = asyncio.get_running_loop()
        jobs = [
            _Job(
                item,
                one,
                np.empty((len(one.windows), COLUMNS), np.float32),
                deque(range(len(one.windows))),
                loop.create_future(),
                goes_first=is_answer and len(one.windows) <= _PIECE_WINDOWS,
            )
            for item, one in zip(items, prepared, strict=True)
        ]
        self._jobs.extend(jobs)
        self._waiting += sum(job.unscored for job in jobs)
        self._wake.set()
        try:
            verdicts = []
            for job in jobs:
                logits = await job.done
                verdicts.append(self._conclude(job, logits))
            return verdicts
        finally:
            for job in jobs:
                # Cancelling a settled future does nothing; an unsettled one leaves the queue.
                job.done.cancel()

    async def _prepare(self, item: GuardInput) -> Windows:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._encoder, self.guard.prepare, item)

    def _check_size(self, prepared: Sequence[Windows]) -> None:
        tokens = sum(len(window) for one in prepared for window in one.windows)
        if tokens > self._tokens_per_request:
            raise TooLarge(
                f"the text is {tokens} tokens long and {self._tokens_per_request} are judged in"
                " one request: send it in parts, or raise judged_tokens_per_request",
                code="too_many_tokens",
            )

    def _check_room(self, prepared: Sequence[Windows]) -> None:
        windows = sum(len(one.windows) for one in prepared)
        # What is over the bound alone is let in when nothing else waits.
        if self._waiting and self._waiting + windows > self._waiting_windows:
            raise Overloaded("too much text is waiting for the guard: try again in a moment")

    def _conclude(self, job: _Job, logits: Logits) -> Verdict:
        try:
            return self.guard.conclude(job.item, job.prepared, logits)
        except ValueError as error:
            raise GuardUnavailable(f"the guard gave no usable verdict: {error}") from error

    async def _run(self) -> None:
        while True:
            rows = self._take()
            if not rows:
                self._wake.clear()
                await self._wake.wait()
                # One turn of the loop lets requests that are ready now share the first batch.
                await asyncio.sleep(0)
                continue
            await self._score(rows)

    def _take(self) -> list[_Row]:
        """The next batch: windows of like length, led by the next of the job whose turn it is."""
        for job in self._jobs:
            if job.done.done():
                # Its caller went away, or it failed.
                self._waiting -= len(job.rest)
                job.rest.clear()
        self._jobs = deque(job for job in self._jobs if job.rest)
        turn = deque(sorted(self._jobs, key=lambda job: not job.goes_first))
        candidates: list[_Row] = []
        position = 0
        while turn and len(candidates) < _CANDIDATES:
            for _ in range(len(turn)):
                job = turn.popleft()
                if position < len(job.rest):
                    number = job.rest[position]
                    candidates.append(_Row(job, number, job.prepared.windows[number]))
                    turn.append(job)
                if len(candidates) == _CANDIDATES:
                    break
            position += 1
        if not candidates:
            return []
        lengths = [len(row.window) for row in candidates]
        chosen = next(rows for rows in pack(lengths, self._token_budget) if 0 in rows)
        taken = [candidates[number] for number in chosen]
        for row in taken:
            row.job.rest.remove(row.number)
        self._waiting -= len(taken)
        if candidates[0].job is self._jobs[0]:
            self._jobs.rotate(-1)
        return taken

    async def _score(self, rows: list[_Row]) -> None:
        try:
            logits = await self._infer(rows)
        except Exception as error:
            if len({id(row.job) for row in rows}) == 1:
                self._fail(rows[0].job, error)
                return
            # One of them may have poisoned the batch: each gets another try of its own.
            by_job: dict[int, list[_Row]] = {}
            for row in rows:
                by_job.setdefault(id(row.job), []).append(row)
            for own in by_job.values():
                await self._score(own)
            return
        for row, values in zip(rows, logits, strict=True):
            job = row.job
            job.logits[row.number] = values
            job.unscored -= 1
            if not job.unscored and not job.done.done():
                job.done.set_result(job.logits)

    async def _infer(self, rows: list[_Row]) -> Logits:
        loop = asyncio.get_running_loop()
        started = loop.time()
        windows = [row.window for row in rows]
        logits = await loop.run_in_executor(self._scorer, self.guard.score, windows)
        if logits.shape != (len(windows), COLUMNS):
            raise ValueError(f"the guard gave logits of shape {logits.shape}")
        tokens = len(windows) * max(map(len, windows))
        self._observe_batch(len(windows), tokens, loop.time() - started)
        return logits

    @staticmethod
    def _fail(job: _Job, error: Exception) -> None:
        if not job.done.done():
            failure = GuardUnavailable(f"the guard failed ({type(error).__name__}): try again")
            failure.__cause__ = error
            job.done.set_exception(failure)
