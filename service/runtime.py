"""Everything that lives as long as the service: opened in order, closed in reverse."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry

from models.checkpoint import CheckpointError
from models.guard import Guard
from models.text_guard import TextGuard
from service.batcher import Batcher
from service.breaker import Breaker
from service.errors import ConfigurationError
from service.gateway import Gateway
from service.judgement import FieldJudge
from service.ledger import Bookkeeper
from service.metrics import Metrics
from service.policy import Policy, read_policy
from service.records import Recorder
from service.response_store import ResponseStore
from service.routing import Route, Upstreams
from service.settings import Settings, UpstreamSettings
from service.spool import Spool
from service.state import State
from service.upstream import Deadlines, Upstream
from service.verdict_cache import VerdictCache, keyed_digest

_SPOOL_BYTES: Final = 64 * 2**20
_WAITING_WINDOWS: Final = 64
"""With so many waiting for the guard, streams are judged in pieces of twice the size."""
_MOST_LOAD: Final = 4.0


@dataclass(frozen=True, slots=True)
class Runtime:
    """The parts of a running service."""

    settings: Settings
    policy: Policy
    guard: Guard
    judge: FieldJudge
    gateway: Gateway
    keeper: Bookkeeper
    metrics: Metrics
    state: State
    upstreams: Upstreams
    responses: ResponseStore
    hash_key: bytes


@asynccontextmanager
async def open_runtime(settings: Settings, guard: Guard | None = None) -> AsyncIterator[Runtime]:
    """Opens a service; ``ConfigurationError`` says in one line what keeps it from starting.

    ``guard`` stands in for the one that the settings name. An unreachable Redis or upstream keeps
    nothing from starting.
    """
    policy = read_policy(settings.policy) if settings.policy else Policy()
    directory = _data_directory(settings.data_directory)
    async with AsyncExitStack() as stack:
        # The guard loads on a thread while the state opens.
        loading = asyncio.create_task(asyncio.to_thread(_load_guard, settings, guard))
        stack.push_async_callback(_settled, loading)
        url = settings.state_url.get_secret_value() if settings.state_url else None
        state = await State.open(url, data_directory=directory)
        stack.push_async_callback(state.close)
        spool = await Spool.open(directory / "records.spool", _SPOOL_BYTES)
        stack.push_async_callback(spool.close)
        recorder = Recorder(state, spool)
        stack.push_async_callback(recorder.close)
        metrics = Metrics(CollectorRegistry())
        upstreams = _upstreams(settings, metrics)
        for route in upstreams.routes:
            await route.open()
            stack.push_async_callback(route.close)
        guard = await loading
        batcher = Batcher(
            guard,
            token_budget=settings.batch_tokens,
            waiting_windows=settings.waiting_windows,
            tokens_per_request=settings.judged_tokens_per_request,
            observe_batch=metrics.batch,
        )
        batcher.start()
        stack.push_async_callback(batcher.close)
        hash_key = _hash_key(directory)
        judge = FieldJudge(
            VerdictCache(batcher, settings.cached_verdicts, metrics.cached),
            keyed_digest(hash_key, guard.id),
            policy,
            deadline=settings.guard_seconds,
            most_fields=settings.fields_per_request,
        )
        keeper = Bookkeeper(metrics, recorder, policy, guard.id)
        metrics.watch(batcher, state, recorder, upstreams)
        metrics.build.labels(version("sluicegate"), guard.id, keeper.policy_name).set(1)
        gateway = Gateway(
            judge,
            upstreams,
            keeper,
            most_streams=settings.streams,
            load=lambda: min(1.0 + batcher.waiting / _WAITING_WINDOWS, _MOST_LOAD),
        )
        responses = ResponseStore(
            state,
            seconds=settings.response_seconds,
            most=settings.kept_responses,
            most_bytes=settings.response_bytes,
        )
        yield Runtime(
            settings=settings,
            policy=policy,
            guard=guard,
            judge=judge,
            gateway=gateway,
            keeper=keeper,
            metrics=metrics,
            state=state,
            upstreams=upstreams,
            responses=responses,
            hash_key=hash_key,
        )


def _load_guard(settings: Settings, given: Guard | None) -> Guard:
    if given is not None:
        return given
    try:
        guard = TextGuard(settings.guard, threads=settings.guard_threads)
        # Ready means that it computes what it computed when it was made.
        guard.check()
    except CheckpointError as error:
        raise ConfigurationError(str(error)) from error
    return guard


async def _settled(task: asyncio.Task[Guard]) -> None:
    await asyncio.gather(task, return_exceptions=True)


def _upstreams(settings: Settings, metrics: Metrics) -> Upstreams:
    given = list(settings.upstreams)
    if settings.upstream is not None:
        given.append(
            UpstreamSettings(
                name="default",
                url=settings.upstream,
                key=settings.upstream_key,
                ca_file=settings.upstream_ca_file,
            )
        )
    return Upstreams([_route(one, settings, metrics) for one in given])


def _route(given: UpstreamSettings, settings: Settings, metrics: Metrics) -> Route:
    upstream = Upstream(
        given.url,
        api_key=given.key.get_secret_value() if given.key else None,
        deadlines=Deadlines(
            connect=given.connect_seconds or settings.upstream_connect_seconds,
            first_byte=given.first_byte_seconds or settings.upstream_first_byte_seconds,
            idle=given.idle_seconds or settings.upstream_idle_seconds,
            total=given.total_seconds or settings.upstream_total_seconds,
        ),
        max_body_bytes=settings.upstream_body_bytes,
        ca_file=given.ca_file,
    )
    breaker = Breaker(settings.upstream_failures, settings.upstream_rest_seconds)
    return Route(given.name, given.models, upstream, breaker, metrics.upstream_answered)


def _data_directory(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(13, "it cannot be written to")
    except OSError as error:
        raise ConfigurationError(
            f"data_directory {path} cannot be used ({error.strerror}): give another with"
            " --data-directory"
        ) from error
    return path


def _hash_key(directory: Path) -> bytes:
    """The key of the hashes in records: random, made once, readable by the owner alone."""
    path = directory / "hash.key"
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from error
    return path.read_bytes()
