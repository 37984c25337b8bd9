"""Every setting, read once at start: a YAML file, then ``SLUICEGATE_*`` variables, then flags."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Any, Final, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from models.checkpoint import DEFAULT_GUARD
from service.errors import ConfigurationError

PREFIX: Final = "SLUICEGATE_"
MEBIBYTE: Final = 2**20
ADMIN_PORT: Final = 8081
"""Where metrics are apart and nobody said where."""


def default_data_directory() -> Path:
    """Where state lives unless it is said: the user's data directory."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "sluicegate"


class UpstreamSettings(BaseModel):
    """One of several upstreams. Deadlines that are not given are the general ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """In metrics and errors."""
    url: str
    models: tuple[str, ...] = ("*",)
    """Names of models, or patterns such as ``llama-*``."""
    key: SecretStr | None = None
    ca_file: Path | None = None
    """Certificates to trust in place of the system's."""
    connect_seconds: float | None = Field(default=None, gt=0)
    first_byte_seconds: float | None = Field(default=None, gt=0)
    idle_seconds: float | None = Field(default=None, gt=0)
    total_seconds: float | None = Field(default=None, gt=0)


class Settings(BaseSettings):
    """Frozen; secrets are masked in its representation."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=PREFIX)

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    admin_host: str = "127.0.0.1"
    admin_port: int | None = Field(default=None, ge=0, le=65535)
    """Metrics and, later, the console. Unset: shared where ``host`` is loopback, else 8081."""
    allow_unauthenticated: bool = False
    """Says that listening beyond loopback without keys is meant."""
    require_keys: bool | None = None
    """Whether requests need an API key. Unset: where ``host`` is beyond loopback."""
    upstream_keys: dict[str, SecretStr] = Field(default_factory=dict)
    """Keys of upstreams, by the name that API keys give them."""
    admin_hosts: tuple[str, ...] = ()
    """Other names that lead to the admin routes."""

    upstream: str | None = None
    """Base URL of the server that is guarded, such as http://127.0.0.1:8000."""
    upstream_key: SecretStr | None = None
    """Sent to the upstream in place of the client's own key."""
    upstreams: tuple[UpstreamSettings, ...] = ()
    """Several, by model; the first that serves a model is asked, ``upstream`` last."""
    upstream_ca_file: Path | None = None
    upstream_failures: int = Field(default=5, ge=1)
    """Failures in a row after which an upstream is left alone."""
    upstream_rest_seconds: float = Field(default=3.0, gt=0)
    """For how long, before it is tried once."""
    upstream_connect_seconds: float = Field(default=5.0, gt=0)
    upstream_first_byte_seconds: float = Field(default=300.0, gt=0)
    upstream_idle_seconds: float = Field(default=60.0, gt=0)
    upstream_total_seconds: float = Field(default=900.0, gt=0)
    upstream_body_bytes: int = Field(default=32 * MEBIBYTE, gt=0)

    guard: Path = DEFAULT_GUARD
    guard_threads: int = Field(default_factory=lambda: len(os.sched_getaffinity(0)), ge=1)
    guard_seconds: float = Field(default=300.0, gt=0)
    """Longest wait for the verdicts of one request, queue included."""
    policy: Path | None = None
    policies: tuple[Path, ...] = ()
    """Other policies, for keys that name them by their id."""
    policy_source: Literal["file", "store"] = "file"
    """Where policies come from: these files, or Redis, where they are published while the service
    runs. With ``store`` the files only fill a store that is empty.
    """
    policy_id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """With ``store``: the policy of whoever has no other. Unset: that of the file ``policy``."""
    policy_stale_seconds: float = Field(default=86_400.0, gt=0)
    """With ``store``: for how long the last known policies hold while Redis is away."""

    data_directory: Path = Field(default_factory=default_data_directory)
    state_url: SecretStr | None = None
    """Redis for records. Unset: a private Valkey in the data directory."""
    private_state_bytes: int = Field(default=512 * 2**20, ge=16 * 2**20)
    """Memory of that private Valkey: beyond it records wait in the spool."""

    log_format: Literal["text", "json"] = "text"
    trace_endpoint: str | None = Field(default=None, pattern=r"^https?://")
    """An OpenTelemetry collector that takes OTLP over HTTP, as http://127.0.0.1:4318."""
    trace_share: float = Field(default=1.0, ge=0, le=1)
    """Share of the traces that begin here that is kept; a client's own is gone on with."""

    body_bytes: int = Field(default=8 * MEBIBYTE, gt=0)
    body_seconds: float = Field(default=60.0, gt=0)
    """Longest wait for the whole body of a request."""
    inputs_per_request: int = Field(default=512, ge=1)
    judged_tokens_per_request: int = Field(default=600_000, ge=1)
    batch_tokens: int = Field(default=4096, ge=256, le=16384)
    waiting_windows: int = Field(default=16384, ge=1)
    """Windows of text that may wait for the guard before new requests are told to come back."""
    streams: int = Field(default=1024, ge=1)
    """Streams that may be open at once."""
    fields_per_request: int = Field(default=4096, ge=1)
    """Messages, tools, documents and the like of one request."""
    cache_url: SecretStr | None = None
    """Redis for verdicts that replicas share, which may evict. Unset: each has its own."""
    cached_verdict_seconds: int = Field(default=86_400, ge=1)
    """For how long a shared verdict is kept."""
    hash_key: SecretStr | None = Field(default=None, min_length=32)
    """Key of all hashes. Replicas that share a Redis need the same one. Unset: one that is made in
    the data directory.
    """
    text_seconds: int = Field(default=7 * 86_400, ge=1)
    """For how long texts are kept where a policy says so."""
    kept_texts: int = Field(default=10_000, ge=1)
    hour_seconds: int = Field(default=90 * 86_400, ge=3600)
    """For how long hourly counts are kept."""
    cached_verdicts: int = Field(default=16384, ge=0)
    """Verdicts that are remembered, so that a conversation's earlier turns cost nothing."""
    kept_responses: int = Field(default=10_000, ge=0)
    """Responses that are kept for ``previous_response_id``; 0 keeps none."""
    response_seconds: int = Field(default=86_400, ge=1)
    response_bytes: int = Field(default=MEBIBYTE // 4, gt=0)
    """Longest response that is kept, its conversation included."""
    open_routes: tuple[str, ...] = ()
    """Routes of the upstream that pass unscanned, as ``POST /v1/rerank``."""

    @field_validator("open_routes")
    @classmethod
    def _routes_are_methods_and_paths(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for route in value:
            if not re.fullmatch(r"(GET|POST|PUT|DELETE) /[\w./-]*", route):
                raise ValueError(f"{route!r} is no route: write it as POST /v1/rerank")
        return value

    @field_validator("upstream", "state_url", "cache_url", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: Any) -> Any:
        return None if value == "" else value

    @model_validator(mode="after")
    def _is_safe(self) -> Settings:
        is_open = not _is_loopback(self.host) and not self.keys_required
        if is_open and not self.allow_unauthenticated:
            raise ValueError(
                f"host {self.host} is open to other machines and require_keys is false:"
                " listen on 127.0.0.1, or say allow_unauthenticated: true"
            )
        if self.policy_id is not None and self.policy_source == "file":
            raise ValueError(
                "policy_id names a published policy, and policy_source is file: name the file with"
                " policy, or set policy_source: store"
            )
        names = [one.name for one in self.upstreams]
        if len({*names, "default"}) != len(names) + 1:
            raise ValueError("upstreams: each needs a name of its own, and default is upstream's")
        admin_port = ADMIN_PORT if self.admin_port is None else self.admin_port
        if self.admin_is_apart and self.port and admin_port == self.port:
            raise ValueError(f"port and admin_port are both {self.port}: give two")
        return self

    @property
    def keys_required(self) -> bool:
        """Whether the guarded routes need an API key."""
        if self.require_keys is not None:
            return self.require_keys
        return not _is_loopback(self.host) and not self.allow_unauthenticated

    @property
    def admin_keys_required(self) -> bool:
        """Whether the routes of operators do."""
        is_open = self.admin_is_apart and not _is_loopback(self.admin_host)
        return self.keys_required or is_open

    @property
    def admin_is_apart(self) -> bool:
        """Whether metrics have a listener of their own."""
        return self.admin_port is not None or not _is_loopback(self.host)


def load(file: Path | None, flags: dict[str, Any]) -> Settings:
    """The settings; ``ConfigurationError`` names the key and the value that are wrong."""
    values = _read(file) if file else {}

    class Loaded(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, values)

    try:
        return Loaded(**{key: value for key, value in flags.items() if value is not None})
    except ValidationError as error:
        raise ConfigurationError(_said(error)) from None
    except SettingsError as error:
        # It names the setting; what was read of it stands in its cause.
        named = re.search(r'field "(\w+)"', str(error))
        variable = f"{PREFIX}{named[1].upper()}" if named else f"a variable {PREFIX}…"
        raise ConfigurationError(
            f'{variable} holds no JSON: write a list or an object, as ["a"] or {{"a": "b"}}'
        ) from None


def _said(error: ValidationError) -> str:
    """The first thing that is wrong, without its value, which may be a secret."""
    first = error.errors(include_input=False, include_url=False)[0]
    key, kind = ".".join(map(str, first["loc"])), first["type"]
    message = first["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        message = "there is no such setting: docs/operations.md lists them"
    elif kind == "too_short":
        message = f"it has fewer than {first['ctx']['min_length']} characters"
    return f"setting {key}: {message}" if key else message


def _read(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from error
    # YAML gives a plain ValueError for a date that there is not, or bytes that are not UTF-8.
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise ConfigurationError(f"{file}{place}: not YAML") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigurationError(f"{file}: expected a mapping of setting names to values")
    return values


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
