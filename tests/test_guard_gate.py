"""The regression gate: the shipped guard on a small fixed set, through the command."""

from pathlib import Path

from typer.testing import CliRunner

from sluicegate import app

DATA = Path(__file__).parent / "fixtures" / "guard_gate.jsonl"
"""Written for this test; no guard is trained or calibrated on it."""

REQUIRED = ("f1>=0.92", "fpr<=0.1", "auprc>=0.97", "severity_qwk>=0.85")
"""A guard that falls below these is worse than the one before it."""


def test_the_shipped_guard_is_as_good_as_it_was() -> None:
    wanted = [part for one in REQUIRED for part in ("--require", one)]
    result = CliRunner().invoke(app, ["eval", "guard", "--data", str(DATA), *wanted])
    assert result.exit_code == 0, result.stderr
