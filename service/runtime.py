"""Everything that lives as long as the service: opened in order, closed in reverse."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry

from models.checkpoint import CheckpointError
from models.guard import Guard
from models.text_guard import TextGuard
from service.audit import Audit
from service.batcher import Batcher
from service.breaker import Breaker
from service.callers import Callers
from service.errors import ConfigurationError
from service.event_index import EventIndex
from service.event_routes import EventRoutes
from service.events import Events
from service.gateway import Gateway
from service.judgement import FieldJudge
from service.kept_texts import KeptTexts
from service.key_store import KeyStore
from service.labels import Labels
from service.ledger import Bookkeeper
from service.metrics import Metrics
from service.policies import Policies, read_policies
from service.policy_routes import PolicyRoutes
from service.policy_store import PolicyStore
from service.rate_limits import RateLimits
from service.records import Recorder
from service.response_store import ResponseStore
from service.review_routes import ReviewRoutes
from service.reviews import Reviews
from service.routing import Route, Upstreams
from service.settings import Settings, UpstreamSettings
from service.shared_verdicts import SharedVerdicts
from service.spool import Spool
from service.state import State
from service.stored_policies import StoredPolicies, read_seed
from service.tracing import OpenTelemetryTracer, Tracer
from service.upstream import Deadlines, Upstream
from service.verdict_cache import VerdictCache, keyed_digest

_HASH_KEY_BYTES: Final = 32
_SPOOL_BYTES: Final = 64 * 2**20
_WAITING_WINDOWS: Final = 64
"""With so many waiting for the guard, streams are judged in pieces of twice the size."""
_MOST_LOAD: Final = 4.0


@dataclass(frozen=True, slots=True)
class Runtime:
    """The parts of a running service."""

    settings: Settings
    policies: Policies
    callers: Callers
    guard: Guard
    judge: FieldJudge
    gateway: Gateway
    keeper: Bookkeeper
    metrics: Metrics
    state: State
    upstreams: Upstreams
    responses: ResponseStore
    event_routes: EventRoutes
    policy_routes: PolicyRoutes
    review_routes: ReviewRoutes
    policy_store: PolicyStore
    reviews: Reviews
    labels: Labels
    hash_key: bytes


@asynccontextmanager
async def open_runtime(settings: Settings, guard: Guard | None = None) -> AsyncIterator[Runtime]:
    """Opens a service; ``ConfigurationError`` says in one line what keeps it from starting.

    ``guard`` stands in for the one that the settings name. An unreachable Redis or upstream keeps
    nothing from starting.
    """
    policies = read_policies(settings.policy, settings.policies)
    directory = _data_directory(settings.data_directory)
    async with AsyncExitStack() as stack:
        # The guard loads on a thread while the state opens.
        loading = asyncio.create_task(asyncio.to_thread(_load_guard, settings, guard))
        stack.push_async_callback(_settled, loading)
        url = settings.state_url.get_secret_value() if settings.state_url else None
        state = await State.open(
            url, data_directory=directory, memory_bytes=settings.private_state_bytes
        )
        stack.push_async_callback(state.close)
        spool = await Spool.open(directory / "records.spool", _SPOOL_BYTES)
        stack.push_async_callback(spool.close)
        recorder = Recorder(state, spool)
        stack.push_async_callback(recorder.close)
        metrics = Metrics(CollectorRegistry())
        tracer = _tracer(settings)
        stack.push_async_callback(asyncio.to_thread, tracer.close)
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
        given = settings.hash_key
        hash_key = given.get_secret_value().encode() if given else _hash_key(directory)
        shared = await _shared_verdicts(settings, directory, stack)
        judge = FieldJudge(
            VerdictCache(batcher, settings.cached_verdicts, metrics.cached, shared),
            keyed_digest(hash_key, _judges(guard)),
            deadline=settings.guard_seconds,
            most_fields=settings.fields_per_request,
        )
        audit = Audit(state)
        texts = KeptTexts(state, audit, seconds=settings.text_seconds, most=settings.kept_texts)
        index = EventIndex(state, hour_seconds=settings.hour_seconds)
        index.start()
        stack.push_async_callback(index.close)
        events = Events(state)
        event_routes = EventRoutes(events, texts, audit, hash_key)
        reviews = Reviews(state)
        stack.push_async_callback(reviews.close)
        keeper = Bookkeeper(metrics, recorder, guard.id, tracer, texts, reviews)
        metrics.watch(batcher, state, recorder, upstreams)
        metrics.watch_shelf(texts, index)
        policy_store = PolicyStore(state)
        if settings.policy_source == "store":

            def show(label: str, guard_id: str = guard.id) -> None:
                metrics.built(version("sluicegate"), guard_id, label)

            policies = StoredPolicies(
                policy_store,
                directory,
                policies,
                read_seed(settings.policy, settings.policies),
                default_id=settings.policy_id or policies.default.id,
                stale_seconds=settings.policy_stale_seconds,
                swapped=show,
            )
            await policies.start()
            stack.push_async_callback(policies.close)
        metrics.built(version("sluicegate"), guard.id, policies.label)
        metrics.watch_desk(reviews, policies)
        keys = KeyStore(state)
        await keys.start()
        stack.push_async_callback(keys.close)
        limits = RateLimits(state)
        metrics.watch_limits(limits)
        callers = Callers(
            policies,
            keys,
            limits,
            required=settings.keys_required,
            admin_required=settings.admin_keys_required,
            upstream_keys={
                name: secret.get_secret_value() for name, secret in settings.upstream_keys.items()
            },
            refused=metrics.refused,
        )
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
            policies=policies,
            callers=callers,
            guard=guard,
            judge=judge,
            gateway=gateway,
            keeper=keeper,
            metrics=metrics,
            state=state,
            upstreams=upstreams,
            responses=responses,
            event_routes=event_routes,
            policy_routes=PolicyRoutes(policy_store, policies, audit),
            review_routes=ReviewRoutes(reviews),
            policy_store=policy_store,
            reviews=reviews,
            labels=Labels(state, events, texts),
            hash_key=hash_key,
        )


async def _shared_verdicts(
    settings: Settings, directory: Path, stack: AsyncExitStack
) -> SharedVerdicts | None:
    if settings.cache_url is None:
        return None
    url = settings.cache_url.get_secret_value()
    state = await State.open(url, data_directory=directory, setting="cache_url", may_evict=True)
    stack.push_async_callback(state.close)
    shared = SharedVerdicts(state, settings.cached_verdict_seconds)
    stack.push_async_callback(shared.close)
    return shared


def _tracer(settings: Settings) -> Tracer:
    if settings.trace_endpoint is None:
        return Tracer()
    return OpenTelemetryTracer(settings.trace_endpoint, settings.trace_share, version("sluicegate"))


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


def _judges(guard: Guard) -> str:
    """What a verdict hangs on beside the text: weights, calibration, and the code around them."""
    card = guard.checkpoint.card.model_dump_json() if isinstance(guard, TextGuard) else ""
    parts = "\0".join((guard.id, card, version("sluicegate")))
    return hashlib.sha256(parts.encode()).hexdigest()


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
        if not path.exists():
            # Written apart: a crash in between leaves no key, rather than an empty one.
            draft = directory / f"hash.key.{secrets.token_hex(8)}"
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(secrets.token_bytes(_HASH_KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                os.link(draft, path)
            draft.unlink()
        key = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be used: {error.strerror}") from error
    if len(key) < _HASH_KEY_BYTES:
        raise ConfigurationError(f"{path} was cut short: remove it, and another is made")
    return key
