"""Put one gateway together and run it.

Each part runs under one task group: when one dies, the process does, loudly.
"""

from __future__ import annotations

import asyncio
import gc
import uuid
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import structlog
from aiohttp import web
from redis.asyncio import Redis

from backends.protocol import Sampling
from gateway.admission import Admission, Limits, Registry, WorkerRecord, open_redis
from gateway.api.app import build_app
from gateway.api.service import Service
from gateway.config import Config, RedisSection
from gateway.credentials import credentials_of
from gateway.life.fleet import Fleet
from gateway.life.relay import Relay
from gateway.metrics import Metrics
from gateway.placement import Placement, Wish, place
from gateway.resume import Records, Retention
from gateway.settings import api_keys, is_loopback
from gateway.tenants import Keyring
from gateway.tenants.door import require_keys
from gateway.text import Vocabulary, load_text

log = structlog.get_logger()

GIVE_UP_SECONDS = 1.0


async def serve_gateway(
    config: Config, *, ready: Callable[[str], None], queue: type[Admission] = Admission
) -> None:
    """Serve HTTP until cancelled, then let running requests end for `gateway.drain_seconds`.

    `ready` is called with the address once connections are accepted; `queue` lets requests in.

    Raises:
        ConfigError: others would reach it, and there is no key.
        OSError: the address cannot be listened on, or a certificate not be read.
    """
    text = await asyncio.to_thread(load_text, Path(config.model.source))
    gateway_id = f"gateway-{uuid.uuid4().hex[:12]}"
    structlog.contextvars.bind_contextvars(gateway=gateway_id)
    async with open_redis(config.redis) as redis:
        await require_keys(config, redis)
        admission = queue(redis, config.deployment, gateway_id, Limits.of(config))
        await _run(config, text, redis, admission, gateway_id, ready)


async def _run(
    config: Config,
    text: Vocabulary,
    redis: Redis,
    admission: Admission,
    gateway_id: str,
    ready: Callable[[str], None],
) -> None:
    keyring = Keyring(api_keys(config), trusting=is_loopback(config.gateway.host))
    async with asyncio.TaskGroup() as tasks:
        registry = Registry(
            redis,
            config.deployment,
            lease_seconds=config.queue.lease_seconds,
            timeout_seconds=config.redis.timeout_seconds,
        )
        credentials = credentials_of(config)
        tls = credentials.client() if credentials is not None else None
        fleet = Fleet(gateway_id, config.security.secret, tls=tls)
        relay = Relay(
            admission,
            fleet,
            max_retries=config.gateway.max_retries,
            worker_wait_seconds=config.queue.worker_wait_seconds,
        )
        records = Records(
            redis,
            config.deployment,
            gateway_id,
            Retention.of(config),
            timeout_seconds=config.redis.timeout_seconds,
        )

        def learn(workers: Mapping[str, WorkerRecord]) -> None:
            mine = {i: r for i, r in workers.items() if r.model == config.model.name}
            fleet.update(mine)

        parts = [
            tasks.create_task(part)
            for part in (
                admission.run(),
                registry.watch(learn),
                fleet.run(),
                records.run(),
                keyring.watch(
                    redis, config.deployment, timeout_seconds=config.redis.timeout_seconds
                ),
            )
        ]
        try:
            service = _service(config, text, relay, fleet, admission, keyring, records)
            await _settle(admission, keyring, records, config.redis)
            await _serve_http(config, build_app(service), relay, ready)
        finally:
            await admission.flush()
            await records.flush()
            for part in parts:
                part.cancel()


async def _settle(
    admission: Admission, keyring: Keyring, records: Records, redis: RedisSection
) -> None:
    """Know Redis before the first request comes; if it is away, start all the same."""
    try:
        async with asyncio.timeout(redis.connect_timeout_seconds + redis.timeout_seconds):
            await admission.until_available()
            await keyring.until_known()
            await records.until_available()
    except TimeoutError:
        log.warning("gateway.alone", cause="Redis does not answer")


def _service(
    config: Config,
    text: Vocabulary,
    relay: Relay,
    fleet: Fleet,
    admission: Admission,
    keyring: Keyring,
    records: Records,
) -> Service:
    metrics = Metrics()
    metrics.watch(
        lambda: fleet.workers,
        {
            "requests_running": lambda: relay.running - admission.waiting,
            "requests_waiting": lambda: admission.waiting,
            "redis_available": lambda: float(admission.available),
        },
    )
    return Service(
        carrier=relay,
        text=text,
        models=(config.model.name,),
        keyring=keyring,
        records=records,
        every_stream=config.resume.every_stream,
        admin_keys=frozenset(config.gateway.admin_keys),
        max_body_bytes=config.gateway.max_body_bytes,
        body_timeout_seconds=config.gateway.body_timeout_seconds,
        request_timeout_seconds=config.gateway.request_timeout_seconds,
        slow_client_seconds=config.gateway.slow_client_seconds,
        max_n=config.gateway.max_n,
        max_choices=config.gateway.max_choices,
        expected_output_tokens=config.gateway.expected_output_tokens,
        first_token_seconds=config.gateway.first_token_seconds,
        first_token_seconds_per_1000=config.gateway.first_token_seconds_per_1000,
        gap_seconds=config.gateway.gap_seconds,
        share_prefixes=config.gateway.share_prefixes,
        ready=lambda: not_ready(relay, admission, fleet, keyring),
        ledger=lambda: ledgers(fleet),
        workers=lambda: workers(fleet),
        drain=fleet.drain,
        request=relay.history.find,
        registry=metrics.registry,
        observe=metrics.observe,
    )


def not_ready(relay: Relay, admission: Admission, fleet: Fleet, keyring: Keyring) -> str | None:
    """Why a request would not be answered now; None when it would."""
    if relay.draining:
        return "this gateway is shutting down"
    if not (admission.available and keyring.known):
        return "Redis does not answer"
    chosen = place(fleet.snapshot(), Wish(tokens=1, sequences=1, sampling=Sampling()))
    return None if isinstance(chosen, Placement) else chosen.reason


async def ledgers(fleet: Fleet) -> dict[str, Any]:
    """`/debug/ledger`: who holds which blocks on every worker, and whether the books balance."""
    books = await fleet.ledgers()
    silent = sorted({worker.id for worker in fleet.workers} - {book.worker for book in books})
    return {
        "balanced": not silent and all(book.balanced for book in books),
        "silent": silent,
        "workers": [
            {
                "worker": book.worker,
                "balanced": book.balanced,
                "pool_blocks": book.pool_blocks,
                "free_blocks": book.free_blocks,
                "holders": [
                    {"reason": reason, "owner": owner, "blocks": blocks}
                    for reason, owner, blocks in book.holders
                ],
                "note": book.note,
            }
            for book in books
        ],
        "pairs": [
            {
                "prefill": prefill,
                "decode": decode,
                "transport": met.transport,
                "plan": met.plan,
                "refusal": met.refusal,
            }
            for prefill, decode, met in fleet.pairs
        ],
    }


def workers(fleet: Fleet) -> dict[str, Any]:
    """`/admin/workers`: who is connected, how full they are, and how each pair hands over."""
    connected = {worker.id: worker for worker in fleet.workers}
    layouts = {worker_id: worker.welcome.info.layout for worker_id, worker in connected.items()}
    return {
        "workers": [
            {
                "worker": worker.id,
                "role": worker.welcome.role,
                "address": worker.record.address,
                "model": layouts[worker.id].model,
                "weights": layouts[worker.id].weights,
                "layout": layouts[worker.id].fingerprint,
                "axes": layouts[worker.id].axes,
                "kind": worker.welcome.info.kind,
                "pools": len(worker.welcome.info.layouts),
                "emulated": worker.emulated,
                "transports": [it.transport for it in worker.welcome.endpoints],
                "left_out": worker.welcome.left_out,
                "breaker": fleet.breakers.shown(worker.id),
                "load": msgspec.structs.asdict(worker.load) if worker.load is not None else None,
            }
            for worker in sorted(connected.values(), key=lambda worker: worker.id)
        ],
        "unreachable": [
            {
                "worker": record.id,
                "role": record.role,
                "address": record.address,
                "layout": record.layout,
                "transports": record.transports,
                "cause": cause,
            }
            for record, cause in fleet.unreachable
        ],
        "pairs": [
            {
                "prefill": prefill,
                "decode": decode,
                "transport": met.transport,
                "reason": met.reason,
                "plan": met.plan,
                "refusal": met.refusal,
                "shunned": prefill in connected[decode].shunned,
                "breaker": fleet.breakers.shown((prefill, decode)),
                "unlike_weights": layouts[prefill].weights != layouts[decode].weights,
            }
            for prefill, decode, met in sorted(fleet.pairs, key=lambda pair: pair[:2])
        ],
    }


async def _serve_http(
    config: Config, app: web.Application, relay: Relay, ready: Callable[[str], None]
) -> None:
    # Without handler_cancellation a client that leaves would be decoded for to the end.
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        keepalive_timeout=config.gateway.keep_alive_seconds,
        shutdown_timeout=0,
    )
    await runner.setup()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, config.gateway.host, config.gateway.port, backlog=2048)
        await site.start()
        host, port = runner.addresses[0][:2]
        shown = f"[{host}]" if ":" in host else host
        _spare_the_collector()
        log.info("gateway.started", host=host, port=port)
        ready(f"http://{shown}:{port}")
        try:
            await asyncio.Event().wait()
        finally:
            await site.stop()
            await _drain(runner, relay, config.gateway.drain_seconds)


def _spare_the_collector() -> None:
    """Let garbage collection pass over what stays: modules and the vocabulary.

    Requests leave next to no cycles; walking through everything for each few hundred of them
    costs a tenth of the gateway's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


async def _drain(runner: web.AppRunner, relay: Relay, seconds: float) -> None:
    """Let what is under way end; what has not ended after `seconds` ends with an error."""
    relay.drain()
    await asyncio.sleep(0)  # requests that have come in time begin to be answered
    server = runner.server
    assert server is not None
    server.pre_shutdown()  # each connection is closed after its request
    if not await _closed(server, seconds):
        relay.give_up()
        await _closed(server, GIVE_UP_SECONDS)


async def _closed(server: web.Server, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            while server.connections:  # noqa: ASYNC110 -- aiohttp does not tell when
                await asyncio.sleep(0.02)
    except TimeoutError:
        return False
    return True
