"""What is scannable in a JSON value: what is judged covers what is forwarded.

A dialect says which keys it knows; ``unknown`` gives every other string, so that a field which is
new to us is judged rather than passed over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from service.body import strings


def leaves(value: Any) -> str:
    """All strings of a JSON value, keys of objects included, one a line."""
    if not value:
        return ""
    return "\n".join(text for text in strings(value) if text.strip())


def named(body: Mapping[str, Any], *names: str) -> str:
    """The strings under the keys ``names``."""
    return leaves([body[name] for name in names if body.get(name)])


def unknown(body: Mapping[str, Any], known: frozenset[str]) -> str:
    """The strings under keys that are not in ``known``."""
    return leaves([body[key] for key in body.keys() - known if body[key] is not None])


def arguments(raw: Any) -> str:
    """The strings in a tool call's arguments, which are JSON in a string, or should be.

    Parsed where it parses: escapes in the raw text would hide words from the guard.
    """
    if not isinstance(raw, str):
        return leaves(raw)
    try:
        parsed = json.loads(raw)
    except (ValueError, RecursionError):
        return raw
    return leaves(parsed) if isinstance(parsed, dict | list) else raw
