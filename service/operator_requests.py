"""What the routes of operators read of a request: its query and its body, each refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from starlette.datastructures import QueryParams

from service.body import parse_object
from service.endpoint import Call
from service.errors import BadRequest

NOBODY: Final = "anonymous"
"""Who did it, where no key was shown because none is asked for."""
_LONGEST: Final = 256


def who(call: Call) -> str:
    """The name under which what a caller does is kept: the id of the key."""
    return call.caller.key_id or NOBODY


def query(call: Call, known: Sequence[str]) -> QueryParams:
    """The query, which may hold ``known`` parameters, each once and not too long."""
    given = call.request.query_params
    for name, value in given.multi_items():
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise BadRequest(f"a query parameter is unknown to this route: {takes}")
        if len(given.getlist(name)) > 1:
            raise BadRequest(f"{name} is given twice: give it once", param=name)
        if not 0 < len(value) <= _LONGEST:
            raise BadRequest(f"{name} must have 1 to {_LONGEST} characters", param=name)
    return given


def whole_number(given: QueryParams, name: str, default: int, most: int) -> int:
    """A parameter from 1 to ``most``."""
    text = given.get(name)
    if text is None:
        return default
    # As many digits as are converted quickly.
    if not (text.isascii() and text.isdigit() and len(text) <= 16 and 1 <= int(text) <= most):
        raise BadRequest(f"{name} must be a whole number from 1 to {most}", param=name)
    return int(text)


def one_of(given: QueryParams, words: Mapping[str, Sequence[str]]) -> None:
    """Refuses a parameter that is none of its ``words``."""
    for name, known in words.items():
        if name in given and given[name] not in known:
            raise BadRequest(f"{name} must be one of {', '.join(known)}", param=name)


def body(call: Call, types: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """The JSON object of the body, which may hold keys of these types; an empty body holds none.

    A boolean is no number.
    """
    values = parse_object(call.raw) if call.raw else {}
    for name, value in values.items():
        if name not in types:
            raise BadRequest(f"a key of the body is unknown: it takes {', '.join(types)}")
        wanted = types[name]
        kinds = wanted if isinstance(wanted, tuple) else (wanted,)
        if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds):
            names = " or ".join(_NAMES[kind] for kind in kinds)
            raise BadRequest(f"{name} must be {names}", param=name)
    return values


def needed(values: Mapping[str, Any], name: str) -> Any:
    """A value that the body must hold."""
    if name not in values:
        raise BadRequest(f"the body lacks {name}", param=name)
    return values[name]


_NAMES: Final[Mapping[type, str]] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    type(None): "null",
}
