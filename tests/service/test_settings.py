"""Settings: a file, then variables, then flags; what is wrong is named before anything starts."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from service.errors import ConfigurationError
from service.settings import Settings, default_data_directory, load


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "settings.yaml"


def refused(file: Path | None, **flags: Any) -> str:
    """The one line with which settings are refused."""
    with pytest.raises(ConfigurationError) as error:
        load(file, flags)
    (line,) = str(error.value).splitlines()
    return line


class TestPrecedence:
    def test_flags_go_before_variables_and_those_before_the_file(
        self, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file.write_text("port: 1001\nadmin_port: 1002\nbody_bytes: 1003\n")
        monkeypatch.setenv("SLUICEGATE_PORT", "2001")
        monkeypatch.setenv("SLUICEGATE_ADMIN_PORT", "2002")
        settings = load(file, {"port": 3001})
        assert (settings.port, settings.admin_port, settings.body_bytes) == (3001, 2002, 1003)

    def test_a_flag_that_was_not_given_says_nothing(self, file: Path) -> None:
        file.write_text("port: 1001")
        assert load(file, {"port": None}).port == 1001

    def test_nothing_has_to_be_set(self) -> None:
        settings = load(None, {})
        assert (settings.host, settings.port, settings.upstream) == ("127.0.0.1", 8080, None)
        assert not settings.admin_is_apart

    @pytest.mark.parametrize("content", ["", "# nothing yet\n"])
    def test_an_empty_file_is_one(self, file: Path, content: str) -> None:
        file.write_text(content)
        assert load(file, {}).model_dump() == load(None, {}).model_dump()

    @pytest.mark.parametrize("name", ["upstream", "state_url", "cache_url"])
    def test_an_address_that_is_empty_is_none(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(f"SLUICEGATE_{name.upper()}", "")
        assert getattr(load(None, {}), name) is None

    def test_variables_of_other_programs_are_not_ours(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PORT", "1")
        assert load(None, {}).port == 8080

    def test_the_data_directory_follows_the_users(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
        assert load(None, {}).data_directory == tmp_path / "sluicegate" == default_data_directory()


class TestRefusal:
    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("colour: red", ["colour", "no such setting"]),
            ("hash_key: short", ["hash_key", "32 characters"]),
            ("port: many", ["port", "integer"]),
            ("port: 70000", ["port", "65535"]),
            ("port:", ["port"]),
            ("body_bytes: 0", ["body_bytes"]),
            ("batch_tokens: 1000000", ["batch_tokens", "16384"]),
            ("upstream_key: [a]", ["upstream_key"]),
            ("- port", ["settings.yaml", "mapping"]),
            ("7: 8", ["settings.yaml", "mapping"]),
            ("null: 8", ["settings.yaml", "mapping"]),
            ("host: h\nport: [", ["settings.yaml", "line 2", "not YAML"]),
            ("port: 2026-13-45", ["settings.yaml", "not YAML"]),
            (b"host: \xff", ["settings.yaml", "not YAML"]),
        ],
    )
    def test_a_file_that_is_wrong_is_refused_by_its_key(
        self, file: Path, content: str | bytes, says: list[str]
    ) -> None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        line = refused(file)
        assert all(part in line for part in says)

    def test_a_file_that_is_not_there_is_named(self, file: Path) -> None:
        assert str(file) in refused(file)

    def test_a_variable_that_is_wrong_is_refused_by_its_key(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SLUICEGATE_GUARD_SECONDS", "-1")
        assert "guard_seconds" in refused(None)

    @pytest.mark.parametrize("name", ["UPSTREAM_KEYS", "POLICIES", "ADMIN_HOSTS"])
    def test_a_variable_that_should_be_json_is_named_without_its_value(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(f"SLUICEGATE_{name}", "hunter2")
        line = refused(None)
        assert f"SLUICEGATE_{name}" in line
        assert "JSON" in line
        assert "hunter2" not in line

    def test_a_secret_is_not_in_what_refuses_it(self, file: Path) -> None:
        file.write_text("state_url: {password: hunter2}")
        assert "hunter2" not in refused(file)


class TestListening:
    @pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
    def test_loopback_needs_nothing_said_and_no_keys(self, host: str) -> None:
        settings = load(None, {"host": host})
        assert not settings.admin_is_apart
        assert not settings.keys_required
        assert not settings.admin_keys_required
        assert load(None, {"host": host, "require_keys": True}).keys_required

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.org"])  # noqa: S104
    def test_beyond_loopback_needs_keys_and_puts_the_metrics_apart(self, host: str) -> None:
        settings = load(None, {"host": host})
        assert settings.keys_required
        assert settings.admin_keys_required
        assert settings.admin_is_apart

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.org"])  # noqa: S104
    def test_beyond_loopback_without_keys_must_be_said(self, host: str) -> None:
        assert "allow_unauthenticated" in refused(None, host=host, require_keys=False)
        assert not load(None, {"host": host, "allow_unauthenticated": True}).keys_required

    @pytest.mark.parametrize(
        "flags", [{}, {"allow_unauthenticated": True}, {"admin_port": 8081}], ids=str
    )
    def test_operators_need_keys_wherever_others_can_reach_their_routes(
        self, flags: dict[str, Any]
    ) -> None:
        host = {} if "admin_port" in flags else {"host": "10.0.0.7"}
        assert load(None, {**host, **flags, "admin_host": "10.0.0.7"}).admin_keys_required

    def test_metrics_are_apart_where_they_have_a_port(self) -> None:
        assert load(None, {"admin_port": 8081}).admin_is_apart

    def test_two_listeners_have_two_ports(self) -> None:
        assert "admin_port" in refused(None, port=9000, admin_port=9000)
        # 0 is any free port: two of them are two.
        assert load(None, {"port": 0, "admin_port": 0}).admin_is_apart

    def test_the_metrics_own_port_is_not_the_public_one_by_default_either(self) -> None:
        assert "8081" in refused(None, host="10.0.0.7", allow_unauthenticated=True, port=8081)


def test_settings_are_frozen() -> None:
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1  # type: ignore[misc]


def test_secrets_are_masked_where_settings_are_shown() -> None:
    settings = Settings(
        upstream_key=SecretStr("hunter2"), state_url=SecretStr("redis://:hunter2@h")
    )
    assert "hunter2" not in f"{settings} {settings!r} {settings.model_dump_json()}"
