"""What the upstream is asked at each attempt: the client's words, then others."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Final

from service.body import dumps
from service.exchange import Dialect, Exchange, Retry
from service.gate import ALL, Generate
from service.policy import Decision

_SEEDS: Final = 2**31


@dataclass(frozen=True, slots=True)
class Asked:
    """One attempt: the exchange that it is, the choices that it is for, and the body to send."""

    exchange: Exchange
    choices: tuple[int, ...]
    body: bytes


def asked(dialect: Dialect, exchange: Exchange, raw: bytes, command: Generate) -> Asked:
    """What ``command`` asks of the upstream; ``raw`` is the client's body, sent as it came where
    nothing must differ.
    """
    if command.attempt == 1:
        changed = dialect.forwarded(exchange)
        body = raw if changed is None else dumps(changed).encode()
        return Asked(exchange, tuple(range(exchange.choices)), body)
    assert command.choices is not ALL
    assert command.because is not None
    seed = _seed(exchange, command.attempt)
    retry = Retry(seed, instruction(command.because), command.choices)
    again = replace(exchange, instruction=retry.instruction, asked_again=command.choices)
    return Asked(again, command.choices, dumps(dialect.retried(again, retry)).encode())


def instruction(because: Decision) -> str:
    """What the model is told before it tries again: category and severity, never the harm."""
    verdict = because.verdict
    names = ", ".join(name.replace("_", " ") for name in verdict.categories[:3]) or "harm"
    return (
        f"A previous answer to this conversation was withheld, because it was judged to be of"
        f" {verdict.level.label} severity ({names}). Answer again without anything of that kind:"
        " give what help is safe, and where none is, say briefly that you cannot help with it."
    )


def _seed(exchange: Exchange, attempt: int) -> int:
    """Another seed for each attempt; reproducible where the client gave one."""
    given = exchange.body.get("seed")
    start = given if type(given) is int else secrets.randbelow(_SEEDS)
    return (start + attempt - 1) % _SEEDS
