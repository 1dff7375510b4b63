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

_FILES = [Path(__file__).with_name(it) for it in ("raw.py", "rounding.py", "kernels.py")]
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


CHUNK_BYTES = 64
"""What `nh` reads at a time: one vector of eight 64-bit words."""

_PAIR: Any = types.UniTuple
_declare: Any = cgutils.get_or_insert_function
_WORD = ir.IntType(64)
_VECTOR = ir.VectorType(_WORD, CHUNK_BYTES // 8)
_SUM = "llvm.vector.reduce.add.v8i64"


def _product(builder: Any, one: Any, other: Any) -> Any:
    """The products of the lower 32 bits of each lane, 64 bits wide."""
    low = ir.Constant(_VECTOR, [0xFFFFFFFF] * _VECTOR.count)
    return builder.mul(builder.and_(one, low), builder.and_(other, low))


def _nh_step(builder: Any, data: Any, keys: Any, chunk: Any) -> tuple[Any, Any]:
    """What one chunk adds to either sum, lane by lane."""
    word = builder.load(builder.gep(data, [chunk]), align=1)
    upper = builder.lshr(word, ir.Constant(_VECTOR, [32] * _VECTOR.count))
    first = builder.mul(chunk, ir.Constant(_WORD, 4))
    key = [
        builder.load(builder.gep(keys, [builder.add(first, ir.Constant(_WORD, it))]), align=8)
        for it in range(4)
    ]
    one = _product(builder, builder.add(word, key[0]), builder.add(upper, key[1]))
    other = _product(builder, builder.add(word, key[2]), builder.add(upper, key[3]))
    return one, other


@intrinsic
def nh(typing: Any, address: Any, chunks: Any, keys: Any) -> Any:
    """NH over `chunks` (at least one) of `CHUNK_BYTES` each, twice, with keys of their own.

    `keys` is the address of 4 * 8 words of 64 bits for each chunk, of which the lower halves
    count: eight for the lower and eight for the upper halves of the chunk's words, then the same
    for the second sum. Written out because loops over tiles this small do not vectorise well.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data, table = (
            builder.inttoptr(it, _VECTOR.as_pointer()) for it in (arguments[0], arguments[2])
        )
        entry = builder.block
        loop = builder.append_basic_block("nh.loop")
        done = builder.append_basic_block("nh.done")
        builder.branch(loop)
        builder.position_at_end(loop)
        chunk, *sums = (builder.phi(it) for it in (_WORD, _VECTOR, _VECTOR))
        added = _nh_step(builder, data, table, chunk)
        totals = [builder.add(total, more) for total, more in zip(sums, added, strict=True)]
        following = builder.add(chunk, ir.Constant(_WORD, 1))
        for phi, value in ((chunk, following), *zip(sums, totals, strict=True)):
            phi.add_incoming(ir.Constant(phi.type, None), entry)
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, arguments[1]), loop, done)
        builder.position_at_end(done)
        kind = ir.FunctionType(_WORD, [_VECTOR])
        reduce = _declare(builder.module, kind, _SUM)
        lanes = [builder.call(reduce, [total]) for total in totals]
        return context.make_tuple(builder, signature.return_type, lanes)

    return _PAIR(types.uint64, 2)(types.int64, types.int64, types.int64), generate
