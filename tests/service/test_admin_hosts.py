"""Who may ask admin routes from a browser: pages of this listener, and no others."""

import pytest

from service.admin_hosts import refuse_foreign
from service.errors import Forbidden

HOSTS = ("Ops.Example.com", "10.0.0.9")


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1:8081", "127.0.0.1"),
        ("localhost:8081", "127.0.0.1"),
        ("LOCALHOST", "127.0.0.1"),
        ("localhost.:8081", "127.0.0.1"),
        ("[::1]:8081", "::1"),
        ("[0:0:0:0:0:0:0:1]:8081", "::1"),
        ("10.1.2.3:8081", "10.1.2.3"),
        ("10.1.2.3:8081", "::ffff:10.1.2.3"),
        ("127.0.0.1:8081", "::ffff:127.0.0.1"),
        ("[fd00::1]:8081", "fd00:0::1"),
        ("ops.example.com", "10.1.2.3"),
        ("10.0.0.9:30081", "10.1.2.3"),
        ("localhost", None),
    ],
)
def test_what_leads_here_may_ask(host: str, address: str | None) -> None:
    refuse_foreign({"host": host}, address, HOSTS)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil.example:8081",
        "localhost@evil.example",
        "localhost evil.example",
        "10.1.2.3",
        "[::2]",
        "[localhost",
        "localhost:port",
    ],
)
def test_another_name_may_not(host: str) -> None:
    with pytest.raises(Forbidden) as refused:
        refuse_foreign({"host": host}, "127.0.0.1", HOSTS)
    assert refused.value.code == "host_not_allowed"


def test_loopback_is_no_address_of_a_listener_elsewhere() -> None:
    with pytest.raises(Forbidden):
        refuse_foreign({"host": "127.0.0.1"}, "10.1.2.3")


def test_without_a_host_nobody_may() -> None:
    with pytest.raises(Forbidden):
        refuse_foreign({}, "127.0.0.1")


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost:8081", "http://localhost:8081"),
        ("127.0.0.1:8081", "http://127.0.0.1:8081"),
        ("ops.example.com", "https://ops.example.com"),
        ("ops.example.com", "http://OPS.example.com"),
        ("ops.example.com:443", "https://ops.example.com"),
        ("[::1]:8081", "http://[::1]:8081"),
    ],
)
def test_a_page_of_the_same_place_may_ask(host: str, origin: str) -> None:
    refuse_foreign({"host": host, "origin": origin}, "127.0.0.1", HOSTS)


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "same-origin", "sec-fetch-dest": "empty"},
        {"sec-fetch-site": "none", "sec-fetch-dest": "document"},
        {"sec-fetch-site": "cross-site", "sec-fetch-dest": "document"},
    ],
    ids=["the console", "a person", "a link that a person follows"],
)
def test_browsers_say_who_asks(headers: dict[str, str]) -> None:
    refuse_foreign({"host": "localhost"} | headers, "127.0.0.1")


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
@pytest.mark.parametrize("kind", ["image", "iframe", "script", "empty"])
def test_another_page_embeds_nothing(site: str, kind: str) -> None:
    with pytest.raises(Forbidden) as refused:
        refuse_foreign(
            {"host": "localhost", "sec-fetch-site": site, "sec-fetch-dest": kind}, "127.0.0.1"
        )
    assert refused.value.code == "origin_not_allowed"


@pytest.mark.parametrize(
    "origin",
    [
        "",
        "null",
        "http://evil.example",
        "http://localhost:9999",
        "http://localhost",
        "http://localhost:8081.evil.example",
        "http://user@localhost:8081",
        "http://127.0.0.1:8081",
        "file://localhost:8081",
        "http://[::1",
    ],
)
def test_a_page_of_another_place_may_not(origin: str) -> None:
    with pytest.raises(Forbidden) as refused:
        refuse_foreign({"host": "localhost:8081", "origin": origin}, "127.0.0.1")
    assert refused.value.code == "origin_not_allowed"
