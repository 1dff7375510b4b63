"""The part of Redis that our scripts use: strings, hashes, sets, sorted sets, lifetimes, channels.

It knows no connection and no Lua. Time is given with each call, in seconds of its own clock.
`test_fake_redis.py` keeps it honest: the same calls are made to a real server.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Argument = bytes | int | float
Value = bytes | dict[bytes, bytes] | dict[bytes, float]


class Wrong(Exception):
    """What the real server answers with an error."""


def text(value: Argument) -> bytes:
    """An argument as Redis stores it; numbers are what Lua's became."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, int):
        return b"%d" % value
    return b"%d" % int(value) if value.is_integer() and abs(value) < 1e17 else b"%.17g" % value


class Store:
    """One server's data. `published` is called with channel and message."""

    def __init__(self) -> None:
        self.values: dict[bytes, Any] = {}
        self.expires: dict[bytes, int] = {}
        self.now_us = 0
        self.published: Callable[[bytes, bytes], int] = lambda channel, message: 0
        self._commands: dict[bytes, Callable[..., Any]] = {
            name[4:].upper().encode(): getattr(self, name)
            for name in dir(self)
            if name.startswith("_do_")
        }

    def call(self, name: bytes, *arguments: Argument) -> Any:
        """Carry out one command.

        Raises:
            Wrong: it is unknown, or the key holds something else.
        """
        command = self._commands.get(name) or self._commands.get(name.upper())
        if command is None:
            raise Wrong(f"ERR unknown command '{name.decode()}'")
        return command(*arguments)

    def sweep(self) -> None:
        """Forget what has lapsed."""
        now = self.now_us // 1000
        for key in [key for key, at in self.expires.items() if at <= now]:
            self._drop(key)

    def copy(self) -> tuple[dict[bytes, Any], dict[bytes, int]]:
        """All that there is now."""
        values = {k: v if isinstance(v, bytes) else type(v)(v) for k, v in self.values.items()}
        return values, dict(self.expires)

    def restore(self, copied: tuple[dict[bytes, Any], dict[bytes, int]]) -> None:
        """Go back to what `copy` gave. Lifetimes have gone on meanwhile."""
        self.values, self.expires = copied
        self.sweep()

    # ---- keys

    def _find(self, key: bytes, kind: type, *, make: bool = False) -> Any:
        at = self.expires.get(key)
        if at is not None and at <= self.now_us // 1000:
            self._drop(key)
        value = self.values.get(key)
        if value is None:
            if make:
                value = self.values[key] = kind()
            return value
        if type(value) is not kind:
            raise Wrong("WRONGTYPE Operation against a key holding the wrong kind of value")
        return value

    def _drop(self, key: bytes) -> None:
        self.values.pop(key, None)
        self.expires.pop(key, None)

    def _tidy(self, key: bytes) -> None:
        if not self.values.get(key):
            self._drop(key)

    def _alive(self, key: bytes) -> bool:
        at = self.expires.get(key)
        if at is not None and at <= self.now_us // 1000:
            self._drop(key)
        return key in self.values

    def _do_time(self) -> Any:
        return [b"%d" % (self.now_us // 1_000_000), b"%d" % (self.now_us % 1_000_000)]

    def _do_exists(self, *keys: bytes) -> int:
        return sum(self._alive(key) for key in keys)

    def _do_del(self, *keys: bytes) -> int:
        gone = [key for key in keys if self._alive(key)]
        for key in gone:
            self._drop(key)
        return len(gone)

    _do_unlink = _do_del

    def _do_pexpire(self, key: bytes, ms: Argument, *options: bytes) -> int:
        if not self._alive(key):
            return 0
        at = self.now_us // 1000 + int(ms)
        before = self.expires.get(key)
        words = {text(it).upper() for it in options}
        if (b"GT" in words and (before is None or at <= before)) or (
            b"NX" in words and before is not None
        ):
            return 0
        self.expires[key] = at
        if at <= self.now_us // 1000:
            self._drop(key)
        return 1

    def _do_expire(self, key: bytes, seconds: Argument) -> int:
        return self._do_pexpire(key, 1000 * int(seconds))

    def _do_persist(self, key: bytes) -> int:
        return int(self._alive(key) and self.expires.pop(key, None) is not None)

    def _do_pttl(self, key: bytes) -> int:
        if not self._alive(key):
            return -2
        at = self.expires.get(key)
        return -1 if at is None else at - self.now_us // 1000

    def _do_publish(self, channel: bytes, message: Argument) -> int:
        return self.published(channel, text(message))

    # ---- strings

    def _do_get(self, key: bytes) -> bytes | None:
        found: bytes | None = self._find(key, bytes)
        return found

    def _do_set(self, key: bytes, value: Argument, *options: Argument) -> Any:
        words = [text(it) for it in options]
        upper = [it.upper() for it in words]
        there = self._alive(key)
        if (b"NX" in upper and there) or (b"XX" in upper and not there):
            return None
        kept = self.expires.get(key) if b"KEEPTTL" in upper else None
        self._drop(key)
        self.values[key] = text(value)
        if kept is not None:
            self.expires[key] = kept
        for name, unit in ((b"PX", 1), (b"EX", 1000)):
            if name in upper:
                ms = int(words[upper.index(name) + 1]) * unit
                self.expires[key] = self.now_us // 1000 + ms
        return "OK"

    def _do_incrby(self, key: bytes, by: Argument) -> int:
        at = self.expires.get(key)
        number = int(self._find(key, bytes) or b"0") + int(by)
        self.values[key] = b"%d" % number
        if at is not None and key in self.expires:
            self.expires[key] = at
        return number

    def _do_incr(self, key: bytes) -> int:
        return self._do_incrby(key, 1)

    # ---- hashes

    def _do_hset(self, key: bytes, *pairs: Argument) -> int:
        hash_ = self._find(key, dict, make=True)
        before = len(hash_)
        for name, value in zip(pairs[::2], pairs[1::2], strict=True):
            hash_[text(name)] = text(value)
        return len(hash_) - before

    def _do_hsetnx(self, key: bytes, name: Argument, value: Argument) -> int:
        hash_ = self._find(key, dict, make=True)
        if text(name) in hash_:
            return 0
        hash_[text(name)] = text(value)
        return 1

    def _do_hget(self, key: bytes, name: Argument) -> bytes | None:
        hash_ = self._find(key, dict)
        return hash_.get(text(name)) if hash_ else None

    def _do_hmget(self, key: bytes, *names: Argument) -> list[bytes | None]:
        hash_ = self._find(key, dict) or {}
        return [hash_.get(text(name)) for name in names]

    def _do_hgetall(self, key: bytes) -> list[bytes]:
        return [it for pair in (self._find(key, dict) or {}).items() for it in pair]

    def _do_hkeys(self, key: bytes) -> list[bytes]:
        return list(self._find(key, dict) or ())

    def _do_hvals(self, key: bytes) -> list[bytes]:
        return list((self._find(key, dict) or {}).values())

    def _do_hlen(self, key: bytes) -> int:
        return len(self._find(key, dict) or ())

    def _do_hexists(self, key: bytes, name: Argument) -> int:
        return int(text(name) in (self._find(key, dict) or ()))

    def _do_hdel(self, key: bytes, *names: Argument) -> int:
        hash_ = self._find(key, dict) or {}
        gone = sum(hash_.pop(text(name), None) is not None for name in names)
        self._tidy(key)
        return gone

    def _do_hincrby(self, key: bytes, name: Argument, by: Argument) -> int:
        hash_ = self._find(key, dict, make=True)
        number = int(hash_.get(text(name), b"0")) + int(by)
        hash_[text(name)] = b"%d" % number
        return number

    def _do_hincrbyfloat(self, key: bytes, name: Argument, by: Argument) -> bytes:
        hash_ = self._find(key, dict, make=True)
        number = float(hash_.get(text(name), b"0")) + float(by)
        hash_[text(name)] = text(number)
        return text(number)

    # ---- sets

    def _do_sadd(self, key: bytes, *members: Argument) -> int:
        found = self._find(key, set, make=True)
        before = len(found)
        found.update(map(text, members))
        return len(found) - before

    def _do_srem(self, key: bytes, *members: Argument) -> int:
        found = self._find(key, set) or set()
        gone = found & set(map(text, members))
        found -= gone
        self._tidy(key)
        return len(gone)

    def _do_scard(self, key: bytes) -> int:
        return len(self._find(key, set) or ())

    def _do_smembers(self, key: bytes) -> list[bytes]:
        return sorted(self._find(key, set) or ())

    def _do_sismember(self, key: bytes, member: Argument) -> int:
        return int(text(member) in (self._find(key, set) or ()))

    # ---- sorted sets

    def _zset(self, key: bytes, *, make: bool = False) -> dict[bytes, float]:
        found: dict[bytes, float] | None = self._find(key, Sorted, make=make)
        return found if found is not None else {}

    def _do_zadd(self, key: bytes, *words: Argument) -> int:
        options: set[bytes] = set()
        while isinstance(words[0], bytes) and words[0].upper() in OPTIONS:
            options.add(words[0].upper())
            words = words[1:]
        zset = self._zset(key, make=True)
        added = changed = 0
        for score, member in zip(words[::2], words[1::2], strict=True):
            name, number = text(member), float(score)
            before = zset.get(name)
            if before is None:
                if b"XX" not in options:
                    zset[name] = number
                    added += 1
            elif b"NX" not in options and not (
                (b"GT" in options and number <= before) or (b"LT" in options and number >= before)
            ):
                changed += before != number
                zset[name] = number
        self._tidy(key)
        return added + changed if b"CH" in options else added

    def _do_zrem(self, key: bytes, *members: Argument) -> int:
        zset = self._zset(key)
        gone = sum(zset.pop(text(member), None) is not None for member in members)
        self._tidy(key)
        return gone

    def _do_zscore(self, key: bytes, member: Argument) -> bytes | None:
        score = self._zset(key).get(text(member))
        return None if score is None else text(score)

    def _do_zincrby(self, key: bytes, by: Argument, member: Argument) -> bytes:
        zset = self._zset(key, make=True)
        score = zset[text(member)] = zset.get(text(member), 0.0) + float(by)
        return text(score)

    def _do_zcard(self, key: bytes) -> int:
        return len(self._zset(key))

    def _do_zcount(self, key: bytes, low: Argument, high: Argument) -> int:
        return len(self._between(key, low, high))

    def _do_zrank(self, key: bytes, member: Argument) -> int | None:
        names = [name for name, _ in self._sorted(key)]
        return names.index(text(member)) if text(member) in names else None

    def _do_zrange(self, key: bytes, start: Argument, stop: Argument, *words: Argument) -> Any:
        options = [text(it).upper() for it in words]
        if b"BYSCORE" in options:
            if b"REV" in options:
                raise Wrong("ERR the fake does not know ZRANGE BYSCORE REV")
            return self._shown(self._between(key, start, stop), options)
        found = self._sorted(key)
        if b"REV" in options:
            found.reverse()
        first, last = int(start), int(stop)
        first = max(0, first + len(found) if first < 0 else first)
        last = last + len(found) if last < 0 else last
        return self._shown(found[first : last + 1], options)

    def _do_zrangebyscore(self, key: bytes, low: Argument, high: Argument, *words: Argument) -> Any:
        return self._shown(self._between(key, low, high), [text(it).upper() for it in words])

    def _do_zremrangebyscore(self, key: bytes, low: Argument, high: Argument) -> int:
        gone = self._between(key, low, high)
        return self._do_zrem(key, *(name for name, _ in gone)) if gone else 0

    def _do_zpopmin(self, key: bytes, count: Argument = 1) -> list[bytes]:
        gone = self._sorted(key)[: int(count)]
        self._do_zrem(key, *(name for name, _ in gone))
        return self._shown(gone, [b"WITHSCORES"])

    def _sorted(self, key: bytes) -> list[tuple[bytes, float]]:
        zset = self._zset(key)
        return sorted(zset.items(), key=lambda it: (it[1], it[0]))

    def _between(self, key: bytes, low: Argument, high: Argument) -> list[tuple[bytes, float]]:
        least, above = _border(low)
        most, below = _border(high)
        return [
            (name, score)
            for name, score in self._sorted(key)
            if (score > least if above else score >= least)
            and (score < most if below else score <= most)
        ]

    def _shown(self, found: list[tuple[bytes, float]], options: list[bytes]) -> list[bytes]:
        if b"LIMIT" in options:
            place = options.index(b"LIMIT")
            first, count = int(options[place + 1]), int(options[place + 2])
            found = found[first:] if count < 0 else found[first : first + count]
        if b"WITHSCORES" in options:
            return [it for name, score in found for it in (name, text(score))]
        return [name for name, _ in found]


class Sorted(dict[bytes, float]):
    """A sorted set."""


OPTIONS = frozenset({b"NX", b"XX", b"GT", b"LT", b"CH"})


def _border(value: Argument) -> tuple[float, bool]:
    """A border of a range of scores, and whether it lies outside."""
    if isinstance(value, bytes) and value.startswith(b"("):
        return float(value[1:]), True
    return float(value), False
