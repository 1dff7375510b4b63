"""Compile Python to machine code that reads and writes memory at bare addresses.

What `compiled` decorates runs without the interpreter's lock and checks no bounds: whoever calls
it has checked the addresses. The result is kept on disk, so that the next process only loads it.
Addresses need no alignment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from llvmlite import ir
from numba import extending
from numba.core import types

Function = TypeVar("Function", bound=Callable[..., Any])

intrinsic: Callable[[Callable[..., Any]], Any] = extending.intrinsic

compiled: Callable[[Function], Function] = cast(
    "Any", numba.njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)
)
inlined: Callable[[Function], Function] = cast(
    "Any",
    numba.njit(nogil=True, cache=True, error_model="numpy", boundscheck=False, forceinline=True),
)


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
load64 = _loader(types.uint64, ir.IntType(64))


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
