"""`baton keys add | list | revoke`: who may use this deployment, and on which terms.

With `redis.url` the keys are there. Without it they are in the embedded Redis of `data_dir`, which
is started for the moment when no `baton serve` runs it.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from redis.exceptions import RedisError

from gateway.admission import Terms, open_redis
from gateway.config import Config
from gateway.leash import leashed
from gateway.redis_server import (
    DataDirInUse,
    claim,
    command,
    find_server,
    run_dir,
    wait_until_up,
)
from gateway.settings import ConfigError, Problem
from gateway.tenants import KeyStore, NoSuchKey

START_SECONDS = STOP_SECONDS = 30.0
TERMS: dict[str, tuple[type, str]] = {
    "weight": (float, "share of the queue beside other tenants (1)"),
    "priority": (int, "priority of requests that say none, -8 to 7 (0)"),
    "requests": (int, "requests per minute; 0: no limit"),
    "prefill_tokens": (int, "prompt tokens per minute; 0: no limit"),
    "decode_tokens": (int, "generated tokens per minute; 0: no limit"),
    "concurrent": (int, "requests that wait or run at once; 0: no limit"),
}
BOUNDS = {"weight": (0.001, 1000.0), "priority": (-8, 7)}
MOST = 1 << 53


def add_arguments(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    """The words of `baton keys`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add = actions.add_parser("add", parents=[common], help="make a key, and print it this once")
    add.add_argument("tenant", help="whose key it is")
    for name, (kind, text) in TERMS.items():
        add.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=text)
    actions.add_parser("list", parents=[common], help="list keys and their tenants' terms")
    revoke = actions.add_parser("revoke", parents=[common], help="end a key")
    revoke.add_argument("id", help="as `list` shows it")


def run_keys(options: argparse.Namespace, config: Config) -> int:
    """Do what `options` say; returns the exit code.

    Raises:
        ConfigError: a term is out of its bounds, or Redis cannot be reached.
    """
    acts: dict[str, Callable[[KeyStore], Awaitable[str]]] = {
        "add": lambda store: _add(store, options.tenant, terms_of(options)),
        "list": _list,
        "revoke": lambda store: _revoke(store, options.id),
    }
    try:
        with _redis(config) as url:
            print(asyncio.run(_within(config, url, acts[options.action])))
    except (RedisError, OSError, TimeoutError) as error:
        raise ConfigError(Problem("redis.url", "", f"Redis cannot be reached: {error}")) from error
    except NoSuchKey as error:
        print(f"baton: {error}")
        return 1
    return 0


def terms_of(options: argparse.Namespace) -> dict[str, float]:
    """The terms that the command line names.

    Raises:
        ConfigError: one is out of its bounds.
    """
    given = {name: getattr(options, name) for name in TERMS if getattr(options, name) is not None}
    for name, value in given.items():
        least, most = BOUNDS.get(name, (0, MOST))
        if not least <= value <= most:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(Problem(flag, "", f"{value} is not between {least} and {most}"))
    if not (options.tenant.isprintable() and 0 < len(options.tenant) <= 64):
        raise ConfigError(Problem("TENANT", "", "expected 1 to 64 printable characters"))
    return given


@contextmanager
def _redis(config: Config) -> Iterator[str]:
    """The address of the Redis that has the keys."""
    if config.redis.url:
        yield config.redis.url
        return
    data_dir = Path(config.data_dir)
    socket = run_dir(data_dir) / "redis.sock"
    try:
        lock = claim(data_dir)
    except DataDirInUse:  # by a `baton serve`, whose server we may ask
        yield f"unix://{socket}"
        return
    with lock:
        folder = data_dir / "redis"
        folder.mkdir(mode=0o700, exist_ok=True)
        server = subprocess.Popen(
            leashed(command(find_server(), folder, socket)), stdout=subprocess.DEVNULL
        )
        try:
            asyncio.run(wait_until_up(f"unix://{socket}", START_SECONDS))
            yield f"unix://{socket}"
        finally:
            server.terminate()
            server.wait(STOP_SECONDS)


async def _within(config: Config, url: str, act: Callable[[KeyStore], Awaitable[str]]) -> str:
    async with open_redis(config.redis, url) as redis, asyncio.timeout(START_SECONDS):
        return await act(KeyStore(redis, config.deployment))


async def _add(store: KeyStore, tenant: str, terms: dict[str, float]) -> str:
    key_id, key = await store.add(tenant, terms)
    return f"{key}\n\nThis key of {tenant} has the id {key_id}. It is not shown again."


async def _revoke(store: KeyStore, key_id: str) -> str:
    tenant = await store.revoke(key_id)
    return f"The key {key_id} of {tenant} has ended; gateways refuse it within seconds."


async def _list(store: KeyStore) -> str:
    tenants = await store.tenants()
    rows = [("id", "tenant", "created", "weight", "priority", "per minute", "at once")]
    for key_id, record in sorted((await store.keys()).items(), key=lambda item: item[1].tenant):
        tenant = tenants[record.tenant]
        created = time.strftime("%Y-%m-%d", time.gmtime(record.created_at))
        terms = tenant.terms
        share = (f"{terms.weight:g}", str(tenant.priority), _limits(terms))
        rows.append((key_id, tenant.name, created, *share, str(terms.concurrent or "any")))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def _limits(terms: Terms) -> str:
    kinds = {
        "requests": terms.requests,
        "prompt tokens": terms.prefill_tokens,
        "generated tokens": terms.decode_tokens,
    }
    return ", ".join(f"{limit} {kind}" for kind, limit in kinds.items() if limit) or "any"
