"""Which pages may ask admin routes; pure. Against DNS rebinding and cross-site requests.

A page on a foreign site can send requests to a listener on loopback by the user's browser. It
cannot choose their ``Host`` (the name that it was loaded from, also where that name was pointed
here later) nor their ``Origin``.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from service.errors import Forbidden

_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?")
_PORTS = {"http": "80", "https": "443"}


def refuse_foreign(
    headers: Mapping[str, str], address: str | None, hosts: Collection[str] = ()
) -> None:
    """Raises ``Forbidden`` unless ``Host`` names this listener and ``Origin``, if sent, is the
    same place. ``headers`` are found by names in lower case.

    Browsers send no ``Origin`` for what a page embeds, as an image; they say so otherwise. A link
    from elsewhere that a person follows is let in.

    ``address`` is the one that the connection came in on; ``hosts`` are other names that lead here.
    """
    authority = headers.get("host", "")
    match = _AUTHORITY.fullmatch(authority)
    if match is None or _name(match[1]) not in _names(address, hosts):
        raise Forbidden(
            "the Host of this request is not an address of this listener:"
            " add its name to the setting admin_hosts",
            code="host_not_allowed",
        )
    origin = headers.get("origin")
    is_foreign = origin is not None and not _is_same_place(origin, match)
    if is_foreign or (
        headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        and headers.get("sec-fetch-dest") != "document"
    ):
        raise Forbidden(
            "the Origin of this request is another site: ask from the console's own page",
            code="origin_not_allowed",
        )


def _names(address: str | None, hosts: Collection[str]) -> set[str]:
    names = {"localhost", *map(_name, hosts)}
    if address:
        names.add(_name(address))
    # A name can be pointed here by anybody, an address cannot: all of loopback is one place.
    if address is None or _is_loopback(address):
        names |= {"127.0.0.1", "::1"}
    return names


def _is_same_place(origin: str, host: re.Match[str]) -> bool:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    shown = _AUTHORITY.fullmatch(parts.netloc)
    if shown is None or parts.scheme not in _PORTS:
        return False
    # A proxy may speak TLS before us, so the scheme is the page's, and the Host's port too.
    usual = _PORTS[parts.scheme]
    return _name(shown[1]) == _name(host[1]) and (shown[2] or usual) == (host[2] or usual)


def _name(host: str) -> str:
    """A host in one spelling: addresses as ``ipaddress`` writes them, names in lower case."""
    bare = host.strip("[]").rstrip(".").lower()
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        return bare
    # So says a listener on :: of who came to it by IPv4.
    return str(getattr(address, "ipv4_mapped", None) or address)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(_name(address)).is_loopback
    except ValueError:
        return False
