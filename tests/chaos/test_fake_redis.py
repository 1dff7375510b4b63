"""The fake Redis of the control scenario, kept honest by real servers.

The same calls are made to both. Our scripts read the time from a key instead of the server's
clock, so that they see the same time on either side.
"""

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from redis import Redis as RealClient
from redis.exceptions import ResponseError

from gateway.admission.scripts import Keys, script
from gateway.admission.wishes import (
    Enqueue,
    Leave,
    Publish,
    RateLimits,
    Renew,
    Requeue,
    TicketWords,
    Withdraw,
)
from tests.chaos.control.redis_store import Store, Wrong
from tests.control.conftest import LiveServer, programs

CLOCK = b"the clock"
LEASE_MS, LIFETIME_MS = 30_000, 600_000
CALLS = 400
PTTL_SLACK_MS = 20_000
KEYS = Keys("fake")


class Real:
    """A real server."""

    def __init__(self, url: str) -> None:
        self.client = RealClient.from_url(url, protocol=2)
        self.client.flushall()
        self._raw = RealClient.from_url(url, protocol=2)
        self._raw.response_callbacks.clear()
        self._pubsub = self.client.pubsub()
        self._pubsub.psubscribe("*")
        self._pubsub.get_message(timeout=1)

    def call(self, *words: Any) -> Any:
        try:
            return plain(self._raw.execute_command(*words))
        except ResponseError as error:
            return f"error {str(error)[:9]}"

    def script(self, source: str, keys: list[str], argv: list[Any]) -> Any:
        return plain(self._raw.eval(source, len(keys), *keys, *argv))

    def heard(self) -> list[tuple[bytes, bytes]]:
        self.client.publish("that is all", "")
        found = []
        while (message := self._pubsub.get_message(timeout=5))["channel"] != b"that is all":
            found.append((message["channel"], message["data"]))
        return sorted(found)

    def keys(self) -> dict[bytes, Any]:
        read = {
            b"string": lambda key: self.client.get(key),
            b"hash": lambda key: self.client.hgetall(key),
            b"zset": lambda key: dict(self.client.zrange(key, 0, -1, withscores=True)),
            b"set": lambda key: set(self.client.smembers(key)),
        }
        return {key: read[self.client.type(key)](key) for key in self.client.scan_iter()}

    def lives(self, key: bytes) -> int:
        return self.client.pttl(key)


class Fake:
    """The fake."""

    def __init__(self) -> None:
        self.store = Store()
        self.store.now_us = 10**15
        self.store.published = self._publish
        self._told: list[tuple[bytes, bytes]] = []

    def _publish(self, channel: bytes, message: bytes) -> int:
        self._told.append((channel, message))
        return 1

    def call(self, name: str, *words: Any) -> Any:
        encoded = [it if isinstance(it, bytes) else str(it).encode() for it in words]
        try:
            answer = self.store.call(name.encode(), *encoded)
        except Wrong as error:
            return f"error {str(error)[:9]}"
        return plain(answer)

    def script(self, source: str, keys: list[str], argv: list[Any]) -> Any:
        names = [it.encode() for it in keys]
        words = [it if isinstance(it, bytes) else str(it).encode() for it in argv]
        return plain(self.store.run(source.encode(), names, words))

    def heard(self) -> list[tuple[bytes, bytes]]:
        told, self._told = self._told, []
        return sorted(told)

    def keys(self) -> dict[bytes, Any]:
        return {key: self.store.read(key) for key in self.store.keys}

    def lives(self, key: bytes) -> int:
        return self.store.call(b"PTTL", key)


def plain(value: Any) -> Any:
    """One form for what two clients say."""
    if isinstance(value, list | tuple):
        return [plain(it) for it in value]
    if isinstance(value, bool):
        return b"OK" if value else 0
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, float):
        return b"%d" % value if value.is_integer() else b"%.17g" % value
    return value


@pytest.fixture(scope="module", params=sorted(programs()))
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    import asyncio

    with tempfile.TemporaryDirectory(prefix="baton-test-") as folder:
        server = LiveServer(programs()[request.param], Path(folder))
        asyncio.run(server.start())
        yield server.url
        server.kill()


def command(dice: random.Random) -> tuple[Any, ...]:
    """Something that our scripts might do, on one of few keys, of whatever type it is."""
    key, field = dice.choice("abc"), dice.choice("xyz")
    number, other = dice.randint(-5, 9), round(dice.uniform(0, 9), 3)
    some = dice.sample("xyz", 2)
    return dice.choice(
        [
            ("SET", key, number, *dice.choice([(), ("PX", 10**6)])),
            ("GET", key),
            ("DEL", key),
            ("EXISTS", key, dice.choice("abc")),
            ("PEXPIRE", key, 10**6),
            ("PEXPIRE", key, 0),
            ("HSET", key, field, other, dice.choice("xyz"), number),
            ("HGET", key, field),
            ("HMGET", key, *some),
            ("HDEL", key, *some),
            ("HGETALL", key),
            ("ZADD", key, other, field),
            ("ZADD", key, number, field, number + 1, "w"),
            ("ZREM", key, *some),
            ("ZSCORE", key, field),
            ("ZCARD", key),
            ("ZCOUNT", key, f"({number}", other),
            ("ZRANGE", key, number, dice.randint(-3, 3), *dice.choice([(), ("WITHSCORES",)])),
            ("ZRANGEBYSCORE", key, "-inf", f"({other}", "LIMIT", 0, 2),
            ("ZRANGEBYSCORE", key, number, "+inf", "WITHSCORES"),
            ("ZREMRANGEBYSCORE", key, "-inf", number),
            ("SADD", key, *some),
            ("SREM", key, *some),
            ("SCARD", key),
        ]
    )


@pytest.mark.parametrize("seed", range(6))
def test_commands_do_what_they_do_on_a_real_server(url: str, seed: int) -> None:
    dice, real, fake = random.Random(seed), Real(url), Fake()
    for number in range(2000):
        words = command(dice)
        assert fake.call(*words) == real.call(*words), (number, words)
        if not number % 50:
            same_keys(fake, real)


class Caller:
    """Makes calls as gateways and workers do, at random."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.now_ms = 1_700_000_000_000
        self.ids = [f"r{n}" for n in range(12)]
        self.epochs: dict[str, int] = {}
        self.server, self.former = "run1", ""

    def words(self, dice: random.Random) -> TicketWords:
        limited = dice.random() < 0.5
        tenant = dice.choice(("ann", "bob"))
        return TicketWords(
            visit=dice.randint(1, 2),
            owner=dice.randint(1, 2),
            tenant=tenant,
            prefill=dice.randint(1, 30),
            decode=dice.randint(1, 30),
            expected=dice.randint(0, 20),
            weight={"ann": 1.0, "bob": 2.5}[tenant],
            band=dice.randint(6, 8),
            counts=dice.randint(0, 1),
            concurrent=dice.choice((0, 3)),
            limited=limited,
            limits=RateLimits(100, 500, 0) if limited else RateLimits(0, 0, 0),
        )

    def next(self) -> tuple[str, list[str], list[Any]]:
        dice = self.dice
        self.now_ms += dice.choice((0, 1, 20, 300, 5_000, 20_000 if dice.random() < 0.2 else 1))
        gateway, worker = dice.choice(("g0", "g1")), dice.choice(("p", "d"))
        some = dice.sample(self.ids, dice.randint(0, 3))
        held = [(it, self.epochs.get(it, 1), self.words(dice)) for it in some]
        one, epoch = dice.choice(self.ids), self.epochs.get(dice.choice(self.ids), 1)
        if dice.random() < 0.02:
            self.former, self.server = self.server, f"run{dice.random()}"
        name, who, wish = dice.choice(
            [
                *[("enqueue", gateway, self.enqueue(one))] * 4,
                *[("leave", gateway, Leave([(it, 1, 3) for it in some], [(one, epoch)]))] * 3,
                (
                    "requeue",
                    gateway,
                    Requeue(one, epoch, worker, dice.choice(("prefill", "decode")), 5, 9000),
                ),
                ("renew", gateway, Renew(dice.random() < 0.9, held, [one])),
                ("publish", worker, self.publish(worker)),
                ("withdraw", worker, Withdraw(dice.randint(1, 2))),
                ("roster", "", None),
            ]
        )
        if wish is None:
            return name, [KEYS.roster], [KEYS.prefix]
        packed = msgspec.msgpack.encode(wish)
        argv = [KEYS.prefix, "m", LIFETIME_MS, LEASE_MS, who, self.server, self.former, packed]
        return name, [KEYS.room("m")], [*argv, b"a record"] if name == "publish" else argv

    def record(self) -> tuple[str, list[str], list[Any]]:
        """One operation on the record of one of a few requests, by one of two gateways."""
        dice = self.dice
        self.now_ms += dice.choice((0, 1, 300, 9_000))
        name = dice.choice(self.ids[:4])
        wish = {
            "op": dice.choice(("open", "open", "take", "again", "claim", "settle", "drop")),
            "id": name,
            "tenant": dice.choice(("ann", "ann", "bob")),
            "key": dice.choice(("", f"key of {name}")),
            "body": dice.choice(("", "a body", "a body", "another")),
            "epoch": dice.randint(1, 4),
            "floor": dice.choice((0, 0, 3)),
            "left": dice.randint(1, 60_000),
            "lifetime": dice.randint(20_000, LIFETIME_MS),
            "most": dice.choice((2, 100)),
        }
        argv = [KEYS.prefix, dice.choice(("g0", "g1")), msgspec.msgpack.encode(wish)]
        return "record", [f"{KEYS.prefix}records"], [*argv, b"saved", b"answer"]

    def keys(self) -> tuple[str, list[str], list[Any]]:
        """Somebody wants the API keys, and may know them."""
        return "keys", list(KEYS.api_keys), [self.dice.choice((b"", b"1", b"2"))]

    def enqueue(self, name: str) -> Enqueue:
        dice = self.dice
        return Enqueue(
            id=name,
            ticket=self.words(dice),
            patience=dice.randint(1, 60_000),
            deadline=dice.randint(1, 60_000),
            max_waiting=dice.choice((2, 100)),
            again=dice.random() < 0.1,
        )

    def publish(self, worker: str) -> Publish:
        offers = (self.dice.randint(20, 90), 0) if worker == "p" else (0, self.dice.randint(20, 90))
        return Publish(self.dice.randint(1, 2), *offers)

    def learn(self, fake: Fake) -> None:
        """Which epochs are the latest."""
        tickets = fake.store.read(f"{KEYS.prefix}tickets:m".encode()) or {}
        for name, packed in tickets.items():
            self.epochs[name.decode()] = msgspec.msgpack.decode(packed)["epoch"]


def with_clock(name: Any) -> str:
    return script(name).source.replace(
        "redis.call('TIME')", f"redis.call('HMGET', '{CLOCK.decode()}', 's', 'us')"
    )


@pytest.mark.parametrize("seed", range(8))
def test_our_scripts_do_what_they_do_on_a_real_server(url: str, seed: int) -> None:
    caller, real, fake = Caller(seed), Real(url), Fake()
    for number in range(CALLS):
        name, keys, argv = caller.next()
        clock = ("HSET", CLOCK, "s", caller.now_ms // 1000, "us", caller.now_ms % 1000 * 1000)
        real.call(*clock)
        fake.call(*clock)
        source = with_clock(name)
        assert fake.script(source, keys, argv) == real.script(source, keys, argv), (number, name)
        assert fake.heard() == real.heard(), (number, name)
        caller.learn(fake)
        if caller.dice.random() < 0.03:  # a gateway's life runs out
            gone = KEYS.gateway(caller.dice.choice(("g0", "g1")))
            assert fake.call("DEL", gone) == real.call("DEL", gone)
        if not number % 20:
            same_keys(fake, real)
    same_keys(fake, real)
    lives = {key: (fake.lives(key), real.lives(key)) for key in fake.store.keys}
    assert all(abs(ours - theirs) < PTTL_SLACK_MS for ours, theirs in lives.values()), lives


@pytest.mark.parametrize("seed", range(4))
def test_records_and_keys_are_what_they_are_on_a_real_server(url: str, seed: int) -> None:
    caller, real, fake = Caller(seed), Real(url), Fake()
    version, keys, tenants = KEYS.api_keys
    for number in range(CALLS):
        if caller.dice.random() < 0.05:  # as `baton keys` does
            field = caller.dice.choice("abc")
            for words in (
                ("SET", version, caller.dice.choice("12")),
                ("HSET", caller.dice.choice((keys, tenants)), field, number),
            ):
                assert fake.call(*words) == real.call(*words)
        name, named, argv = caller.record() if caller.dice.random() < 0.8 else caller.keys()
        clock = ("HSET", CLOCK, "s", caller.now_ms // 1000, "us", caller.now_ms % 1000 * 1000)
        assert fake.call(*clock) == real.call(*clock)
        source = with_clock(name)
        ours, theirs = (it.script(source, named, argv) for it in (fake, real))
        assert in_order(ours) == in_order(theirs), (number, name, argv)
        if not number % 20:
            same_keys(fake, real)
    same_keys(fake, real)


def in_order(answer: Any) -> Any:
    """A hash that is answered, in one order."""
    if isinstance(answer, list):
        return [sorted(it) if isinstance(it, list) else it for it in answer]
    return answer


def same_keys(fake: Fake, real: Real) -> None:
    ours, theirs = fake.keys(), real.keys()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert unpacked(value) == unpacked(theirs[key]), key


def unpacked(value: Any) -> Any:
    """Tables are packed in whatever order Lua has them."""
    if isinstance(value, dict):
        return {name: unpacked(it) for name, it in value.items()}
    if isinstance(value, bytes) and value[:1] >= b"\x80":
        return msgspec.msgpack.decode(value)
    return value


def test_a_key_lapses_and_a_restart_forgets_what_was_written_last() -> None:
    fake = Fake()
    fake.call("SET", "a", 1, "PX", 1000)
    kept = fake.store.copy()
    fake.call("SET", "b", 1)
    fake.store.now_us += 999_000
    assert fake.call("EXISTS", "a", "b") == 2
    fake.store.now_us += 1_000
    fake.store.restore(kept)
    assert fake.call("EXISTS", "a", "b") == 0
