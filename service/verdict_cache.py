"""Verdicts that were given before: a text is judged once while it is remembered.

The key is a keyed hash of exactly what was judged (``digest``), so no text is kept. What is being
judged is not judged again meanwhile: whoever asks for the same waits for it.
"""

from __future__ import annotations

import asyncio
import hmac
from collections import OrderedDict
from collections.abc import Callable, Sequence

from models.inputs import GuardInput
from models.verdict import Verdict
from service.batcher import Batcher

Digest = Callable[[GuardInput], bytes]


def keyed_digest(key: bytes, guard: str) -> Digest:
    """Hashes of judged inputs under ``key``, apart for each guard: text, context, role."""

    def digest(item: GuardInput) -> bytes:
        parts = [guard, item.role, item.text]
        for turn in item.context:
            parts += (turn.speaker, turn.text)
        # Lengths keep apart what only lies differently in its parts.
        sizes = ",".join(map(str, map(len, parts)))
        message = "\x00".join((sizes, *parts)).encode("utf-8", "surrogatepass")
        return hmac.digest(key, message, "sha256")

    return digest


class VerdictCache:
    """Judges through a batcher, remembering at most ``most`` verdicts, the latest used.

    ``observe`` is told of each text whether its verdict was there.
    """

    def __init__(
        self, batcher: Batcher, most: int, observe: Callable[[bool], None] = lambda _: None
    ) -> None:
        self._batcher = batcher
        self._most = most
        self._observe = observe
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        self._flights: dict[bytes, asyncio.Future[Verdict | None]] = {}

    def __len__(self) -> int:
        return len(self._verdicts)

    async def judge(
        self, items: Sequence[GuardInput], digests: Sequence[bytes], *, is_answer: bool = False
    ) -> list[Verdict]:
        """Verdicts on ``items``, in their order; see ``Batcher.judge``."""
        found: list[Verdict | None] = [self._remembered(digest) for digest in digests]
        own: list[int] = []
        awaited: list[tuple[int, asyncio.Future[Verdict | None]]] = []
        for number, verdict in enumerate(found):
            self._observe(verdict is not None)
            if verdict is not None:
                continue
            flight = self._flights.get(digests[number])
            if flight is None:
                self._flights[digests[number]] = asyncio.get_running_loop().create_future()
                own.append(number)
            else:
                awaited.append((number, flight))
        if own:
            verdicts = await self._judge(own, items, digests, is_answer)
            for number, verdict in zip(own, verdicts, strict=True):
                found[number] = verdict
        for number, flight in awaited:
            # A shield, for being cancelled here must not cancel it for others.
            verdict = await asyncio.shield(flight)
            if verdict is None:
                # Whoever had begun went away or failed.
                (verdict,) = await self._batcher.judge([items[number]], is_answer=is_answer)
                self._remember(digests[number], verdict)
            found[number] = verdict
        return [verdict for verdict in found if verdict is not None]

    async def _judge(
        self,
        numbers: Sequence[int],
        items: Sequence[GuardInput],
        digests: Sequence[bytes],
        is_answer: bool,
    ) -> list[Verdict]:
        verdicts: list[Verdict] = []
        try:
            verdicts = await self._batcher.judge([items[n] for n in numbers], is_answer=is_answer)
        finally:
            given: list[Verdict | None] = [*verdicts] or [None] * len(numbers)
            for number, verdict in zip(numbers, given, strict=True):
                self._flights.pop(digests[number]).set_result(verdict)
                if verdict is not None:
                    self._remember(digests[number], verdict)
        return verdicts

    def _remembered(self, digest: bytes) -> Verdict | None:
        verdict = self._verdicts.get(digest)
        if verdict is not None:
            self._verdicts.move_to_end(digest)
        return verdict

    def _remember(self, digest: bytes, verdict: Verdict) -> None:
        if self._most:
            self._verdicts[digest] = verdict
            if len(self._verdicts) > self._most:
                self._verdicts.popitem(last=False)
