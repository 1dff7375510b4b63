"""Compile Python to machine code that reads and writes memory at bare addresses.

What `compiled` decorates runs without the interpreter's lock and checks no bounds: whoever calls
it has checked the addresses. The result is kept on disk, so that the next process only loads it.
Addresses need no alignment.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from llvmlite import ir
from numba import extending
from numba.core import caching, cgutils, types

Function = TypeVar("Function", bound=Callable[..., Any])

intrinsic: Callable[[Callable[..., Any]], Any] = extending.intrinsic

_NAMES = ("raw.py", "rounding.py", "walking.py", "sockets.py", "kernels.py", "coding.py")
_FILES = [Path(__file__).with_name(it) for it in _NAMES]
SOURCES = hashlib.sha256(b"".join(it.read_bytes() for it in _FILES)).hexdigest()


class _Cache(caching.FunctionCache):
    """Compiled functions on disk, told apart by all sources of ours that can be compiled into them.

    Left alone, numba looks at the file of the function itself, and keeps what it inlined.
    """

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        key: Any = super()._index_key
        return (*key(sig, codegen), SOURCES)


def _compiler(*, forceinline: bool) -> Callable[[Function], Function]:
    make: Any = numba.njit(
        nogil=True, error_model="numpy", boundscheck=False, forceinline=forceinline
    )
    cache: Any = _Cache

    def compile_(function: Function) -> Function:
        made = make(function)
        with contextlib.suppress(RuntimeError):  # no folder to keep it in: compiled in each process
            made._cache = cache(function)  # noqa: SLF001 -- what its `enable_caching` does
        return cast("Function", made)

    return compile_


def kept_in(function: Any) -> Path | None:
    """The folder in which what `compiled` made is kept; None where there is none."""
    path = function._cache.cache_path  # noqa: SLF001 -- numba does not say otherwise
    return Path(path) if path is not None else None


compiled = _compiler(forceinline=False)
inlined = _compiler(forceinline=True)


def _loader(kind: Any, word: ir.Type) -> Any:
    def load(typing: Any, base: Any, index: Any) -> Any:
        """Number `index` of those that begin at address `base`."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            start = builder.inttoptr(arguments[0], word.as_pointer())
            return builder.load(builder.gep(start, [arguments[1]]), align=1)

        return kind(types.int64, types.int64), generate

    return intrinsic(load)


def _storer(kind: Any, word: ir.Type) -> Any:
    def store(typing: Any, base: Any, index: Any, value: Any) -> Any:
        """Set number `index` of those that begin at address `base`."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            start = builder.inttoptr(arguments[0], word.as_pointer())
            builder.store(arguments[2], builder.gep(start, [arguments[1]]), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, kind), generate

    return intrinsic(store)


load8, store8 = _loader(types.uint8, ir.IntType(8)), _storer(types.uint8, ir.IntType(8))
load16, store16 = _loader(types.uint16, ir.IntType(16)), _storer(types.uint16, ir.IntType(16))
load32, store32 = _loader(types.uint32, ir.IntType(32)), _storer(types.uint32, ir.IntType(32))
load64, store64 = _loader(types.uint64, ir.IntType(64)), _storer(types.uint64, ir.IntType(64))


def _bitcast(source: Any, target: Any, word: ir.Type) -> Any:
    def cast_bits(typing: Any, value: Any) -> Any:
        """The same bits, read as another type."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], word)

        return target(source), generate

    return intrinsic(cast_bits)


as_float = _bitcast(types.uint32, types.float32, ir.FloatType())
as_bits = _bitcast(types.float32, types.uint32, ir.IntType(32))

_BYTE = ir.IntType(8)
_POINTER = _BYTE.as_pointer()


def _memcpy(builder: Any, target: Any, source: Any, count: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [_POINTER, _POINTER, ir.IntType(64), ir.IntType(1)])
    copy = builder.module.declare_intrinsic("llvm.memcpy", [_POINTER, _POINTER, count.type], kind)
    pointers = [builder.inttoptr(it, _POINTER) for it in (target, source)]
    builder.call(copy, [*pointers, count, ir.Constant(ir.IntType(1), 0)])


@intrinsic
def copy(typing: Any, target: Any, source: Any, count: Any) -> Any:
    """Copy `count` bytes from address `source` to `target`, which do not overlap."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _memcpy(builder, *arguments)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def copy_fixed(typing: Any, target: Any, source: Any, count: Any) -> Any:
    """As `copy`, of a number of bytes that is a literal: compiled to a few instructions."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        size = ir.Constant(ir.IntType(64), count.literal_value)
        _memcpy(builder, arguments[0], arguments[1], size)
        return context.get_dummy_value()

    if not isinstance(count, types.IntegerLiteral):
        return None
    return types.void(types.int64, types.int64, count), generate


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Ask for the cache line at `address`, which need not exist."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [_POINTER, number, number, number])
        ask = builder.module.declare_intrinsic("llvm.prefetch", [_POINTER], kind)
        how = [ir.Constant(number, it) for it in (0, 3, 1)]  # to read, keep near, data
        builder.call(ask, [builder.inttoptr(arguments[0], _POINTER), *how])
        return context.get_dummy_value()

    return types.void(types.int64), generate


_declare: Any = cgutils.get_or_insert_function


def _on_socket(name: str) -> Any:
    def call(typing: Any, descriptor: Any, message: Any, flags: Any) -> Any:
        """`sendmsg` or `recvmsg` with a `struct msghdr` at an address: bytes, or minus `errno`."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            number = ir.IntType(32)
            kind = ir.FunctionType(ir.IntType(64), [number, _POINTER, number])
            function = _declare(builder.module, kind, name)
            where = ir.FunctionType(number.as_pointer(), [])
            error = _declare(builder.module, where, "__errno_location")
            descriptor, flags = (builder.trunc(arguments[it], number) for it in (0, 2))
            message = builder.inttoptr(arguments[1], _POINTER)
            count = builder.call(function, [descriptor, message, flags])
            code = builder.sext(builder.load(builder.call(error, [])), count.type)
            failed = builder.icmp_signed("<", count, ir.Constant(count.type, 0))
            return builder.select(failed, builder.neg(code), count)

        return types.int64(types.int64, types.int64, types.int64), generate

    return intrinsic(call)


sendmsg, recvmsg = _on_socket("sendmsg"), _on_socket("recvmsg")

PAIR_BYTES = 16
"""What one product of `nh` takes in: two words of 64 bits."""

_WORD, _WIDE = ir.IntType(64), ir.IntType(128)
_PAIR: Any = types.UniTuple


@intrinsic
def nh(typing: Any, address: Any, keys: Any, pairs: Any) -> Any:
    """NH over `pairs` (a literal) pairs of 64-bit words at `address`, with as many at `keys`.

    The sum of the products of (word + key) * (word + key), modulo 2**128: its lower and its upper
    half. Written out because there is no such product in Python's types.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data, key = (builder.inttoptr(it, _WORD.as_pointer()) for it in arguments[:2])

        def factor(number: int) -> Any:
            index = [ir.Constant(_WORD, number)]
            word = builder.load(builder.gep(data, index), align=1)
            keyed = builder.add(word, builder.load(builder.gep(key, index), align=8))
            return builder.zext(keyed, _WIDE)

        total = ir.Constant(_WIDE, 0)
        for number in range(0, 2 * pairs.literal_value, 2):
            total = builder.add(total, builder.mul(factor(number), factor(number + 1)))
        upper = builder.lshr(total, ir.Constant(_WIDE, 64))
        halves = [builder.trunc(it, _WORD) for it in (total, upper)]
        return context.make_tuple(builder, signature.return_type, halves)

    if not isinstance(pairs, types.IntegerLiteral):
        return None
    return _PAIR(types.uint64, 2)(types.int64, types.int64, pairs), generate
