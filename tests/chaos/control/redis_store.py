"""The part of Redis that our scripts use, and the Lua 5.1 that runs them, as in Redis.

What it holds lives in Lua too (`redis_store.lua`), where scripts reach it at next to no cost. It
knows no connection. Time is given with each call. `test_fake_redis.py` keeps it honest: the same
calls are made to a real server.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from lupa import lua51

Value = bytes | dict[bytes, bytes] | dict[bytes, float] | set[bytes]


class Wrong(Exception):
    """What the real server answers with an error."""


class Snapshot(msgspec.Struct, frozen=True):
    """All that a store held at some time."""

    state: Any


class Store:
    """One server's data. `published` is called with channel and message."""

    def __init__(self) -> None:
        self.now_us = 0
        self.published: Callable[[bytes, bytes], int] = lambda channel, message: 0
        self._state: Any = _LUA.new()
        self._read: dict[bytes, tuple[int, Value | None]] = {}

    def call(self, name: bytes, *arguments: bytes) -> Any:
        """Carry out one command.

        Raises:
            Wrong: it is unknown, or the key holds something else.
        """
        _hearing.append(self.published)
        try:
            went_well, answer = _LUA.call(self._state, self.now_us, name.upper(), *arguments)
        finally:
            _hearing.pop()
        if not went_well:
            raise Wrong(answer.decode())
        return _plain(answer)

    def run(self, source: bytes, keys: Sequence[bytes], argv: Sequence[bytes]) -> Any:
        """Run a script.

        Raises:
            Wrong: it failed; what it had done stays done.
        """
        script = _compiled(source)
        _hearing.append(self.published)
        try:
            return _plain(_LUA.run(self._state, self.now_us, script, len(keys), *keys, *argv))
        except lua51.LuaError as error:
            raise Wrong(f"ERR Error running script: {error}") from error
        finally:
            _hearing.pop()

    def read(self, key: bytes) -> Value | None:
        """What a key holds; not to be changed. The same object as before when that is the same."""
        change = _LUA.change(self._state, self.now_us, key)
        known = self._read.get(key)
        if known is None or known[0] != change:
            known = self._read[key] = change, self._look(key)
        return known[1]

    @property
    def keys(self) -> list[bytes]:
        """Those that there are, without those that have lapsed."""
        return _listed(_LUA.names(self._state, self.now_us))

    def lasts(self, key: bytes) -> bool:
        """Whether it has a lifetime."""
        return bool(_LUA.lasts(self._state, key))

    def copy(self) -> Snapshot:
        """All that there is now."""
        return Snapshot(_LUA.copy(self._state))

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to what `copy` gave, once. Lifetimes have gone on meanwhile."""
        self._state = snapshot.state
        self._read.clear()

    def _look(self, key: bytes) -> Value | None:
        kind, *items = _listed(_LUA.read(self._state, key)) or [None]
        if kind is None:
            return None
        if kind == b"string":
            text: bytes = items[0]
            return text
        if kind == b"set":
            return set(items[::2])
        return dict(zip(items[::2], items[1::2], strict=True))


@cache
def digest(source: bytes) -> bytes:
    """The name under which a server knows a script."""
    return hashlib.sha1(source, usedforsecurity=False).hexdigest().encode()


@cache
def _compiled(source: bytes) -> Any:
    return _RUNTIME.compile(source)


def _plain(value: Any) -> Any:
    """An answer, as a client is told it."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool) or value is None:
        return 1 if value else None
    if isinstance(value, int | float):
        return int(value)
    if b"ok" in value:
        return value[b"ok"]
    return [_plain(value[number]) for number in range(1, len(value) + 1)]


def _listed(values: Any) -> list[Any]:
    """What a function of Lua returned: nothing, one value, or several."""
    return [] if values is None else list(values) if isinstance(values, tuple) else [values]


_hearing: list[Callable[[bytes, bytes], int]] = []
"""Whoever is told of what is published just now."""

_RUNTIME: Any = lua51.LuaRuntime(
    encoding=None, unpack_returned_tuples=True, register_eval=False, register_builtins=False
)
_LUA: Any = _RUNTIME.execute(
    Path(__file__).with_suffix(".lua").read_bytes(),
    lambda channel, message: _hearing[-1](channel, message),
    msgspec.msgpack.encode,
    msgspec.msgpack.decode,
)
