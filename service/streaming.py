"""Drives the gate over an answer that streams in, and sends of it what the gate releases.

One loop takes up whatever comes: a verdict, a piece of the answer that is worth one, the answer's
end, or the time for a sign of life. The upstream is read by a task of its own, no further ahead
than so many bytes of what was released; while the client reads slowly, nothing more is read.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, Final, Literal

from service import tracing
from service.attempt import HELD_BYTES, StreamedAttempt
from service.errors import UpstreamError, UpstreamMalformed
from service.examiner import Examiner
from service.exchange import Answer, Choice, Field, Refusal
from service.gate import (
    ALL,
    Command,
    Cut,
    DeadlinePassed,
    End,
    Event,
    Generate,
    Generated,
    Grown,
    Judge,
    JudgePieces,
    PiecesJudged,
    PromptJudged,
    Refuse,
    Release,
    ReleaseUpTo,
    ResponseJudged,
    Stop,
)
from service.replies import NotOurs, Progress, completion_tokens
from service.retries import asked
from service.upstream import UpstreamResponse
from service.whole import upstream_said

KEEP_ALIVE_SECONDS: Final = 10.0
_RESPONSE: Final = UpstreamResponse(200, (), b"", 0.0)
"""In place of one: what streamed in has no bytes of its own to pass on."""

_Work = Literal["prompt", "upstream", "pieces", "response"]


class StreamedExchange:
    """One exchange, from its first judgement to its last byte; ``run`` gives what is sent."""

    def __init__(
        self,
        examiner: Examiner,
        progress: Progress,
        *,
        load: Callable[[], float] = lambda: 1.0,
        unjudged: Callable[[int], object] = lambda _: None,
    ) -> None:
        """``load`` is above 1 where the guard is behind; ``unjudged`` is told of characters that
        are sent before they are judged.
        """
        self._examiner = examiner
        self._policy = examiner.policy
        self._mode = self._policy.stream.mode
        self._dialect = progress.dialect
        self._incoming = progress.incoming
        self._exchange = progress.exchange
        self._progress = progress
        self._load = load
        self._unjudged = unjudged
        self._attempt: StreamedAttempt | None = None
        self._attempts: list[StreamedAttempt] = []
        self._shown: StreamedAttempt | None = None
        """The attempt whose stream the client sees; None while it has seen nothing."""
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + self._policy.regenerate.deadline_seconds
        self._works: dict[_Work, asyncio.Task[Any]] = {}
        self._done: deque[_Work] = deque()
        """Works that are over and were not taken up yet."""
        self._grown: dict[int, int] = {}
        self._judging: Mapping[int, int] = {}
        self._stopped: Generated | None = None
        """The end of an attempt that was stopped, of which the gate was not told yet."""
        self._wake: asyncio.Future[bool] | None = None
        self._sent_at = self._loop.time()
        self._last_words = b""
        self._unsent: list[int] = []
        """Choices that were cut before any of them was sent."""
        self._failure: Exception | None = None
        """What the upstream failed with while the prompt was judged."""
        self.end: End | None = None

    async def run(self) -> AsyncGenerator[bytes, None]:
        """The bytes of the answer as they are released, signs of life among them.

        Raises ``SluicegateError``; where that is before the first byte of the answer, it is for the
        caller to answer with a status.
        """
        gate = self._progress.gate
        try:
            commands: deque[Command] = deque(gate.start())
            while True:
                while commands:
                    out = await self._perform(commands.popleft())
                    if out:
                        yield self._sent(out)
                if self.end is not None:
                    return
                if self._mode == "monitor" and (out := self._flushed()):
                    yield self._sent(out)
                # One by one: what is commanded after one may take back the next.
                if (event := self._news()) is not None:
                    commands.extend(gate.feed(event))
                    continue
                self._check_progress()
                if await self._woken():
                    continue
                if self._is_late():
                    await self._stop()
                    commands.extend(gate.feed(DeadlinePassed()))
                else:
                    yield self._sent(self._dialect.keep_alive)
        finally:
            await self._close()

    # --- What the gate commands -----------------------------------------------------------------
    async def _perform(self, command: Command) -> bytes:
        """Carries a command out; what is sent by it."""
        match command:
            case Judge("prompt"):
                self._start("prompt", self._examiner.prompt(self._exchange, self._progress))
            case Judge(_, choices):
                attempt = self._running()
                self._judge("response", {number: attempt.rest(number) for number in choices})
            case JudgePieces(ends):
                self._judging = ends
                self._judge("pieces", self._running().pieces(ends))
            case Generate() as generate:
                self._ask(generate)
            case Stop():
                await self._stop()
                self._stopped = self._given_up()
            case ReleaseUpTo(ends):
                attempt = self._running()
                if self._mode == "monitor":
                    self._unjudged(attempt.size)
                attempt.released |= ends
                return self._flushed()
            case Release(choices):
                return self._released(choices)
            case Cut(choices):
                return self._cut(choices)
            case Refuse(choices):
                return self._refused(choices)
            case End() as end:
                self.end = end
                return self._refused_unsent() + self._ended()
        return b""

    def _ask(self, command: Generate) -> None:
        """Begins an attempt."""
        attempt = asked(self._dialect, self._exchange, self._incoming.raw, command)
        is_same = attempt.choices == tuple(range(self._exchange.choices))
        self._attempt = StreamedAttempt(
            self._dialect,
            attempt.exchange,
            command.attempt,
            attempt.choices,
            passes=is_same and self._shown is None,
            held_bytes=None if self._mode == "buffer" else HELD_BYTES,
            examine=self._examiner.admit_event,
        )
        self._attempts.append(self._attempt)
        self._start("upstream", self._listen(self._attempt, attempt.body))

    async def _listen(self, attempt: StreamedAttempt, body: bytes) -> None:
        route, tracer = self._progress.route, self._examiner.tracer
        with tracer.span(tracing.UPSTREAM, upstream_said(self._progress, attempt.number)):
            headers = tracer.onward(self._incoming.headers)
            async with route.stream(self._dialect.path, body, headers) as stream:
                self._progress.ledger.called_upstream(stream.seconds())
                await attempt.hear(stream, self._heard)

    async def _stop(self) -> None:
        """Leaves the upstream: it stops generating."""
        self._grown = {}
        await self._cancel("upstream")

    def _given_up(self) -> Generated:
        """The end of an attempt that was stopped; its tokens are estimated from what was heard."""
        attempt, progress = self._running(), self._progress
        tokens = attempt.size // 4
        progress.answers.append((_RESPONSE, Answer((), {}, completion_tokens=tokens)))
        progress.attempt_of |= dict.fromkeys(attempt.numbers, attempt.number)
        return Generated((), tokens)

    def _judge(
        self, work: Literal["pieces", "response"], fields: Mapping[int, tuple[Field, ...]]
    ) -> None:
        attempt = self._running()
        judging = self._examiner.response(attempt.exchange, attempt.number, fields, self._progress)
        self._start(work, judging)

    # --- What comes -----------------------------------------------------------------------------
    def _heard(self, characters: int) -> None:
        """More of the answer came."""
        attempt = self._running()
        if self._mode == "monitor" and attempt.released:
            self._unjudged(characters)
        if attempt.passes and self._mode != "buffer":
            self._grown |= attempt.due(self._load())
        if self._grown or self._mode == "monitor":
            self._wake_up()

    def _news(self) -> Event | None:
        """The next that came, as the gate has it."""
        if self._stopped is not None:
            stopped, self._stopped = self._stopped, None
            return stopped
        if self._grown:
            grown, self._grown = Grown(self._grown), {}
            return grown
        while self._done:
            work = self._done.popleft()
            event = self._result(work, self._works.pop(work))
            if event is not None:
                return event
        return None

    def _result(self, work: _Work, task: asyncio.Task[Any]) -> Event | None:
        try:
            return self._meaning(work, task.result())
        except (UpstreamError, NotOurs) as error:
            if "prompt" in self._works:
                # Of a prompt that is blocked nobody asks what the upstream said.
                self._failure = error
                return None
            if self._running().number == 1 or work != "upstream":
                raise
            # What was generated so far stays refused: that is an answer, an error is not.
            return DeadlinePassed()

    def _meaning(self, work: _Work, result: Any) -> Event:
        attempt = self._running() if work != "prompt" else None
        match work:
            case "pieces":
                assert attempt is not None
                for number, end in self._judging.items():
                    decision = result[number]
                    score = decision.verdict.severity_score if decision else 0.0
                    attempt.flows[number].judged(end, score)
                self._judging = {}
                return PiecesJudged(result)
            case "response":
                return ResponseJudged(result)
            case "upstream":
                assert attempt is not None
                return self._whole(attempt)
        assert isinstance(result, PromptJudged)
        return result

    def _whole(self, attempt: StreamedAttempt) -> Generated:
        """The attempt has come to its end."""
        answer, progress = attempt.answer, self._progress
        assert answer is not None
        self._examiner.admit_answer(answer.unscannable)
        progress.answers.append((_RESPONSE, answer))
        progress.choices |= attempt.choices()
        progress.attempt_of |= dict.fromkeys(attempt.numbers, attempt.number)
        return Generated(attempt.numbers, completion_tokens(answer), bool(answer.unscannable))

    def _check_progress(self) -> None:
        """Raises what keeps the exchange from ever going on."""
        if "prompt" in self._works:
            return
        if self._failure is not None:
            raise self._failure
        attempt = self._attempt
        if attempt is not None and attempt.is_full and "pieces" not in self._works:
            raise UpstreamMalformed(
                f"over {HELD_BYTES} bytes of the upstream's stream say nothing that can be judged",
                code="upstream_too_large",
            )

    # --- What is sent ---------------------------------------------------------------------------
    def _flushed(self) -> bytes:
        """The events of the running attempt that may go now."""
        return self._flushed_of(self._attempt) if self._attempt is not None else b""

    def _flushed_of(self, attempt: StreamedAttempt) -> bytes:
        out = attempt.flushed()
        if out:
            self._shown = attempt
        return out

    def _released(self, choices: tuple[int, ...]) -> bytes:
        """Whole choices, of whichever attempt: in its own events where the client sees them."""
        self._progress.released = choices
        out = []
        for attempt in self._attempts:
            if attempt.passes and self._shown in (None, attempt):
                own = [n for n in choices if self._progress.attempt_of[n] == attempt.number]
                if own:
                    attempt.release(own)
                    attempt.dropped |= set(attempt.numbers) - set(own)
                    out.append(self._flushed_of(attempt))
        if self._shown is not None:
            shown = self._shown.number
            out += (
                self._spoken(self._progress.choices[n])
                for n in choices
                if self._progress.attempt_of[n] != shown
            )
        return b"".join(out)

    def _cut(self, choices: tuple[int, ...]) -> bytes:
        attempt = self._running()
        attempt.dropped |= set(choices)
        if self._exchange.choices > 1 or self._shown is None:
            # Some was cleared and none sent, as it waits behind what was not: they are refused.
            self._unsent += (number for number in choices if number not in attempt.begun)
            choices = tuple(number for number in choices if number in attempt.begun)
        out = b"".join(attempt.reader.cut(number) for number in choices) + self._flushed()
        if self._exchange.choices > 1:
            return out
        # The end of the only choice is the end of the stream.
        self._last_words = out
        return b""

    def _refused(self, choices: tuple[int, ...] | None) -> bytes:
        numbers = tuple(range(self._exchange.choices)) if choices is ALL else choices
        self._progress.refused = numbers
        if self._shown is None:
            return b""
        self._shown.dropped |= set(numbers)
        refusal = Refusal(self._policy.refusal.text, self._policy.refusal.finish_reason)
        return self._flushed_of(self._shown) + b"".join(
            self._spoken(self._dialect.refused_choice(self._exchange, number, refusal))
            for number in numbers
        )

    def _refused_unsent(self) -> bytes:
        """Refuses, at the end, the choices that were cut before any of them was sent."""
        if not self._unsent:
            return b""
        earlier = self._progress.refused or ()
        out = self._refused(tuple(self._unsent))
        self._progress.refused = (*earlier, *self._unsent)
        return out

    def _spoken(self, choice: Choice) -> bytes:
        assert self._shown is not None
        return self._shown.reader.spoken(choice)

    @property
    def has_begun(self) -> bool:
        """Whether the client has seen any of an answer."""
        return self._shown is not None

    def said(self) -> Mapping[str, Any] | None:
        """The answer that the client has got, as JSON; None where that is not to be kept."""
        return self._shown.said() if self._shown is not None else None

    def _ended(self) -> bytes:
        """The end of the stream. Where the client has seen nothing, the answer is for the caller to
        render, whole.
        """
        return self._last_words + self._shown.ended() if self._shown is not None else b""

    # --- Work, and time ---------------------------------------------------------------------------
    def _start(self, work: _Work, what: Coroutine[Any, Any, Any]) -> None:
        assert work not in self._works
        task = self._works[work] = asyncio.ensure_future(what)
        task.add_done_callback(lambda done: self._is_over(work, done))

    def _is_over(self, work: _Work, task: asyncio.Task[Any]) -> None:
        if self._works.get(work) is task:
            self._done.append(work)
            self._wake_up()

    def _wake_up(self, has_news: bool = True) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(has_news)

    async def _woken(self) -> bool:
        """Waits until something came; False where it is late, or time for a sign of life."""
        patience = self._sent_at + KEEP_ALIVE_SECONDS - self._loop.time()
        if (left := self._left()) is not None:
            patience = min(patience, left)
        if patience <= 0:
            return False
        self._wake = self._loop.create_future()
        timer = self._loop.call_later(patience, self._wake_up, False)
        try:
            return await self._wake
        finally:
            timer.cancel()
            self._wake = None

    def _left(self) -> float | None:
        """Seconds until the policy's deadline, which later attempts have."""
        if self._attempt is None or self._attempt.number == 1:
            return None
        return self._deadline - self._loop.time()

    def _is_late(self) -> bool:
        left = self._left()
        return left is not None and left <= 0

    def _sent(self, out: bytes) -> bytes:
        self._sent_at = self._loop.time()
        return out

    def _running(self) -> StreamedAttempt:
        assert self._attempt is not None
        return self._attempt

    async def _cancel(self, work: _Work) -> None:
        task = self._works.pop(work, None)
        if work in self._done:
            self._done.remove(work)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _close(self) -> None:
        for work in tuple(self._works):
            await self._cancel(work)
