"""Runs Lua scripts against a `Store`, in a real Lua 5.1, as Redis does."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Any

import msgspec
from lupa import lua51

from tests.chaos.control.redis_store import Store, Wrong

PRELUDE = b"""
local call, pcall_, pack, unpack_ = ...
redis = {call = call, pcall = pcall_, status_reply = function(s) return {ok = s} end,
         error_reply = function(s) return {err = s} end}
cmsgpack = {pack = pack, unpack = unpack_}
KEYS, ARGV = {}, {}
setmetatable(_G, {
  __newindex = function(_, name) error("Attempt to write a global variable: " .. name) end,
  __index = function(_, name) error("Script attempted to access nonexistent global variable '" ..
                                    tostring(name) .. "'") end,
})
return function(keys, argv) rawset(_G, 'KEYS', keys) rawset(_G, 'ARGV', argv) end
"""


class Scripts:
    """One Lua for all stores: what was compiled once is compiled for all."""

    def __init__(self) -> None:
        self._lua: Any = lua51.LuaRuntime(
            encoding=None, unpack_returned_tuples=True, register_eval=False, register_builtins=False
        )
        self._store: Store
        self._set: Any = self._lua.execute(
            PRELUDE, self._call, self._pcall, self._pack, self._unpack
        )
        self._compiled: dict[bytes, Any] = {}
        self._digests: dict[bytes, bytes] = {}

    def digest(self, source: bytes) -> bytes:
        """The name under which a server knows a script."""
        known = self._digests.get(source)
        if known is None:
            known = hashlib.sha1(source, usedforsecurity=False).hexdigest().encode()
            self._digests[source] = known
        return known

    def run(self, store: Store, source: bytes, keys: Sequence[bytes], argv: Sequence[bytes]) -> Any:
        """Run a script.

        Raises:
            Wrong: it failed; what it had done stays done.
        """
        function = self._compiled.get(source)
        if function is None:
            function = self._compiled[source] = self._lua.compile(source)
        self._store = store
        table = self._lua.table_from
        self._set(table(keys), table(argv))
        try:
            return self._reply(function())
        except lua51.LuaError as error:
            raise Wrong(f"ERR Error running script: {error}") from error

    # ---- what a script may call

    def _call(self, name: bytes, *arguments: Any) -> Any:
        answer = self._store.call(name, *arguments)
        if answer is None:
            return False
        if isinstance(answer, list):
            return self._lua.table_from([False if it is None else it for it in answer])
        if isinstance(answer, str):
            return self._lua.table_from({b"ok": answer.encode()})
        return answer

    def _pcall(self, name: bytes, *arguments: Any) -> Any:
        try:
            return self._call(name, *arguments)
        except Wrong as error:
            return self._lua.table_from({b"err": str(error).encode()})

    def _pack(self, *values: Any) -> bytes:
        return b"".join(pack(self._plain(value)) for value in values)

    def _unpack(self, packed: bytes) -> Any:
        return self._table(msgspec.msgpack.decode(packed))

    # ---- between Lua and Python

    def _plain(self, value: Any) -> Any:
        if lua51.lua_type(value) != "table":
            return value
        items = dict(value.items())
        if all(isinstance(key, int) for key in items):
            return [self._plain(items[n]) for n in range(1, len(items) + 1)]
        return {key: self._plain(it) for key, it in items.items()}

    def _table(self, value: Any) -> Any:
        if isinstance(value, str):
            return value.encode()
        if isinstance(value, list):
            return self._lua.table_from([self._table(it) for it in value])
        if isinstance(value, dict):
            return self._lua.table_from({self._table(k): self._table(v) for k, v in value.items()})
        return value

    def _reply(self, value: Any) -> Any:
        if isinstance(value, bool) or value is None:
            return 1 if value else None
        if isinstance(value, float):
            return int(value)
        if lua51.lua_type(value) != "table":
            return value
        if b"ok" in value:
            return value[b"ok"]
        if b"err" in value:
            raise Wrong(value[b"err"].decode())
        answer = []
        for number in range(1, len(value) + 1):
            if value[number] is None:
                break
            answer.append(self._reply(value[number]))
        return answer


def pack(value: Any) -> bytes:
    """MessagePack as Redis's `cmsgpack` writes it: Lua's strings are strings, not binary."""
    if isinstance(value, bytes):
        size = len(value)
        if size < 32:
            return bytes([0xA0 | size]) + value
        if size < 1 << 8:
            return bytes([0xD9, size]) + value
        if size < 1 << 16:
            return b"\xda" + size.to_bytes(2, "big") + value
        return b"\xdb" + size.to_bytes(4, "big") + value
    if isinstance(value, list):
        return _head(len(value), 0x90, 0xDC) + b"".join(map(pack, value))
    if isinstance(value, dict):
        items = [it for pair in value.items() for it in pair]
        return _head(len(value), 0x80, 0xDE) + b"".join(map(pack, items))
    if isinstance(value, float) and struct.unpack(">f", struct.pack(">f", value))[0] == value:
        return b"\xca" + struct.pack(">f", value)
    return msgspec.msgpack.encode(value)


def _head(size: int, short: int, long: int) -> bytes:
    return bytes([short | size]) if size < 16 else bytes([long]) + size.to_bytes(2, "big")
