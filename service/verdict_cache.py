"""Verdicts that were given before: a text is judged once while it is remembered.

The key is a keyed hash of exactly what was judged (``digest``), so no text is kept. What is being
judged is not judged again meanwhile: whoever asks for the same waits for it. Behind the memory of
this process may stand a second tier that replicas share.
"""

from __future__ import annotations

import asyncio
import hmac
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal

from models.inputs import GuardInput
from models.verdict import Verdict
from service.batcher import Batcher
from service.shared_verdicts import SharedVerdicts

Digest = Callable[[GuardInput], bytes]

Tier = Literal["local", "redis"]
Found = Literal["hit", "miss", "error"]
Observe = Callable[[Tier, Found], None]
Flight = asyncio.Future[Verdict | None]
"""A text that is being judged: its verdict, None where that failed, cancelled where given up."""


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

    What is not remembered here is looked for in ``shared`` before it is judged. ``observe`` is told
    of each text, for each tier that was asked, whether its verdict was there; ``error`` means that
    the shared tier could not say.
    """

    def __init__(
        self,
        batcher: Batcher,
        most: int,
        observe: Observe = lambda _tier, _found: None,
        shared: SharedVerdicts | None = None,
    ) -> None:
        self._batcher = batcher
        self._shared = shared
        self._most = most
        self._observe = observe
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        self._flights: dict[bytes, Flight] = {}

    def __len__(self) -> int:
        return len(self._verdicts)

    async def judge(
        self, items: Sequence[GuardInput], digests: Sequence[bytes], *, is_answer: bool = False
    ) -> list[Verdict]:
        """Verdicts on ``items``, in their order; see ``Batcher.judge``."""
        found: list[Verdict | None] = [self._remembered(digest) for digest in digests]
        for verdict in found:
            self._observe("local", "miss" if verdict is None else "hit")
        # Again where whoever had begun went away: one of those who waited begins anew.
        while missing := [number for number, verdict in enumerate(found) if verdict is None]:
            await self._find(missing, found, items, digests, is_answer)
        return [verdict for verdict in found if verdict is not None]

    async def _find(
        self,
        missing: Sequence[int],
        found: list[Verdict | None],
        items: Sequence[GuardInput],
        digests: Sequence[bytes],
        is_answer: bool,
    ) -> None:
        """Fills in ``found`` at the numbers ``missing``, but where a flight was given up."""
        own: list[int] = []
        awaited: dict[int, Flight] = {}
        for number in missing:
            flight = self._flights.get(digests[number])
            if flight is None:
                self._flights[digests[number]] = asyncio.get_running_loop().create_future()
                own.append(number)
            else:
                awaited[number] = flight
        if own:
            await self._fly(own, found, items, digests, is_answer)
        if awaited:
            # Unlike awaiting each, this leaves them alone when it is cancelled.
            await asyncio.wait(awaited.values())
        ended = [number for number, flight in awaited.items() if not flight.cancelled()]
        for number in ended:
            found[number] = awaited[number].result()
        if failed := [number for number in ended if found[number] is None]:
            # It may have been another text of the same request that failed it.
            await self._judge(failed, found, items, is_answer)
            for number in failed:
                self._remember(digests[number], found[number])

    async def _fly(
        self,
        own: Sequence[int],
        found: list[Verdict | None],
        items: Sequence[GuardInput],
        digests: Sequence[bytes],
        is_answer: bool,
    ) -> None:
        """Fills in ``found`` at the numbers ``own``, and tells whoever waits for them."""
        is_given_up = False
        try:
            await self._ask_shared(own, found, digests)
            judged = [number for number in own if found[number] is None]
            if judged:
                verdicts = await self._judge(judged, found, items, is_answer)
                if self._shared is not None:
                    keys = [digests[number] for number in judged]
                    self._shared.put(zip(keys, verdicts, strict=True))
        except asyncio.CancelledError:
            is_given_up = True
            raise
        finally:
            for number in own:
                flight, verdict = self._flights.pop(digests[number]), found[number]
                if verdict is None and is_given_up:
                    flight.cancel()
                else:
                    flight.set_result(verdict)
                self._remember(digests[number], verdict)

    async def _judge(
        self,
        numbers: Sequence[int],
        found: list[Verdict | None],
        items: Sequence[GuardInput],
        is_answer: bool,
    ) -> list[Verdict]:
        asked = [items[number] for number in numbers]
        verdicts = await self._batcher.judge(asked, is_answer=is_answer)
        for number, verdict in zip(numbers, verdicts, strict=True):
            found[number] = verdict
        return verdicts

    async def _ask_shared(
        self, own: Sequence[int], found: list[Verdict | None], digests: Sequence[bytes]
    ) -> None:
        if self._shared is None:
            return
        known = await self._shared.get([digests[number] for number in own])
        if known is None:
            for _ in own:
                self._observe("redis", "error")
            return
        for number, verdict in zip(own, known, strict=True):
            found[number] = verdict
            self._observe("redis", "miss" if verdict is None else "hit")

    def _remembered(self, digest: bytes) -> Verdict | None:
        verdict = self._verdicts.get(digest)
        if verdict is not None:
            self._verdicts.move_to_end(digest)
        return verdict

    def _remember(self, digest: bytes, verdict: Verdict | None) -> None:
        if self._most and verdict is not None:
            self._verdicts[digest] = verdict
            if len(self._verdicts) > self._most:
                self._verdicts.popitem(last=False)
