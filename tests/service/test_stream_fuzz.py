"""Random streams of four dialects through the gateway: nothing is sent before it was cleared.

What is drawn and what is checked of each stream stands in ``benchmarks.fuzz_streams``, which runs
many more of them.
"""

from collections.abc import Sequence

import pytest

from benchmarks.fuzz_streams import DIALECTS, MODES, Mode, run_many
from benchmarks.fuzz_world import MarkerGuard, verdict
from benchmarks.random_texts import flat
from models.inputs import GuardInput
from models.taxonomy import Severity
from models.verdict import Verdict
from service.held import Held

SEEDS = range(300)
ENDINGS = {"whole", "regenerated", "an error", "an error's status"}


@pytest.mark.parametrize("mode", MODES)
def test_whatever_comes_only_what_was_cleared_is_sent(mode: Mode) -> None:
    tally = run_many(SEEDS, mode)
    assert tally.violations == []
    assert tally.early == 0
    # It would hold of nothing at all, too.
    assert {dialect for dialect, _ in tally.endings} == {dialect.name for dialect in DIALECTS}
    endings = {ending for _, ending in tally.endings}
    assert endings >= ENDINGS | ({"cut"} if mode == "hold" else set())
    assert tally.sent > 10_000


def test_a_release_before_the_verdict_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = Held.ready
    everything = dict.fromkeys(range(3), 1 << 61)
    monkeypatch.setattr(Held, "ready", lambda held, _, dropped: ready(held, everything, dropped))
    # Some of these streams are ended badly by it, too.
    tally = run_many(SEEDS, "hold", most_violations=20)
    assert tally.early > 0
    assert any("before their verdict" in violation for violation in tally.violations)


def test_a_word_that_slips_through_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def blind(
        guard: MarkerGuard, items: Sequence[GuardInput], _: Sequence[bytes], **_how: bool
    ) -> list[Verdict]:
        guard.cleared += [flat(item.text) for item in items]
        return [verdict(item.role, Severity.NONE, False) for item in items]

    monkeypatch.setattr(MarkerGuard, "judge", blind)
    tally = run_many(SEEDS, "hold")
    assert "marker was sent" in tally.violations[0]
