"""Attention over the paged pool, as an operator of ONNX Runtime: compiled, in its own threads.

The operator takes the products of one layer, [token, (heads + 2 * kv_heads) * dim], and gives what
the heads make of the values, [token, heads * dim]. Everything else it finds in the *desk*, an array
of integers that `engine.py` fills before each step: addresses, shapes, and the parts into which the
step's attention is cut. It has two halves: turn Q and K and write K and V into the pool; then,
part by part, attend over the pool.

A part is some tokens of one row and one KV head. What it computes for a token depends on that
token's query and the cells before it, never on its neighbours (see `vectors.py`): keys are taken
sixteen at a time from position 0, with the softmax kept up to date on the way (Milakov and
Gimelshein, 2018).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba.core import caching, ccallback, types

from backends.onnxruntime.vectors import (
    LANES,
    ROW_BYTES,
    call1,
    call2,
    call3,
    call5,
    scores4,
    scores8,
    soften,
    transpose,
    weigh4,
    weigh8,
)
from transfer.raw import SOURCES, as_bits, as_float, copy, inlined, load32, load64, store32, store64
from transfer.rounding import FLOAT32, narrow, widen

FIELDS = (
    "get_input", "get_output", "data", "parallel_for", "ready", "part", "turn",
    "heads", "kv_heads", "dim", "interleaved", "kind", "item", "block_tokens",
    "pool", "layer_step", "kv_step", "head_step", "token_step",
    "epsilon", "angles", "scale",
    "tokens", "positions", "cells", "parts", "part_count", "turn_parts",
)  # fmt: skip
"""What stands in the desk, in this order. Steps and addresses are in bytes; `epsilon` and `scale`
are the bits of a float32; `positions`, `cells` and `parts` are addresses of arrays of int64:
the position of each token, the cell of its first K in layer 0, and what `PART_NUMBERS` says."""

(
    GET_INPUT, GET_OUTPUT, DATA, PARALLEL_FOR, READY, PART, TURN,
    HEADS, KV_HEADS, DIM, INTERLEAVED, KIND, ITEM, BLOCK_TOKENS,
    POOL, LAYER_STEP, KV_STEP, HEAD_STEP, TOKEN_STEP,
    EPSILON, ANGLES, SCALE,
    TOKENS, POSITIONS, CELLS, PARTS, PART_COUNT, TURN_PARTS,
) = range(len(FIELDS))  # fmt: skip

PART_NUMBERS = 5
FIRST, COUNT, POSITION, HEAD, TABLE = range(PART_NUMBERS)
"""Of a part: its first flat token and how many, the position of the first, its KV head, and where
the addresses of its row's blocks are, in layer 0."""

OPERATOR_NUMBERS = 8
OF_DESK, OF_LAYER, OF_Q_NORM, OF_K_NORM, OF_INPUT, OF_OUTPUT, OF_SHAPE = range(7)
"""Of an operator: the desk, its layer, the weights of its norms (0: none), addresses of what comes
in and goes out, room for a shape of two."""

_ADDRESS: Any = types.int64
_FILES = [Path(__file__), Path(__file__).with_name("vectors.py")]
_SOURCES = hashlib.sha256(b"".join(it.read_bytes() for it in _FILES) + SOURCES.encode()).hexdigest()


class _Cache(caching.FunctionCache):
    """Compiled callbacks on disk, told apart by all sources that are compiled into them."""

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        key: Any = super()._index_key
        return (*key(sig, codegen), _SOURCES)


Compiler = Callable[[Callable[..., Any]], Any]


def _callback(signature: Any) -> Compiler:
    def compile_(function: Callable[..., Any]) -> Any:
        made: Any = ccallback.CFunc(
            function,
            (signature.args, signature.return_type),
            {},
            {"error_model": "numpy", "boundscheck": False},
        )
        cache: Any = _Cache
        with contextlib.suppress(RuntimeError):  # no folder to keep it in
            made._cache = cache(function)  # noqa: SLF001 -- what its `enable_caching` does
        made.compile()
        return made

    return compile_


@inlined
def _float(address: int, index: int) -> Any:
    return as_float(load32(address, index))


@inlined
def _address_of(array: Any) -> int:
    """Where it is, as long as `_keep` comes later: an address alone keeps nothing alive."""
    return int(array.ctypes.data)


@inlined
def _keep(array: Any) -> None:
    """Have an array live until here."""
    array[0] = 0


# ---- the first half: RoPE, and what goes into the pool


@inlined
def _normed(source: int, target: int, dim: int, weights: int, epsilon: Any) -> None:
    """Divide by the root mean square, multiply with `weights`; copy where there are none."""
    factor = np.float32(1)
    if weights:
        total = np.float32(0)
        for i in range(dim):
            total += _float(source, i) * _float(source, i)
        factor = np.float32(1) / np.sqrt(total / np.float32(dim) + epsilon)
    for i in range(dim):
        value = _float(source, i) * factor
        if weights:
            value *= _float(weights, i)
        store32(target, i, as_bits(np.float32(value)))


@inlined
def _turned(numbers: int, dim: int, interleaved: int, angles: int, scale: Any) -> None:
    """Turn each pair by its angle, in place, and multiply with `scale`."""
    half = dim // 2
    for pair in range(half):
        first, second = pair, pair + half
        if interleaved:
            first, second = 2 * pair, 2 * pair + 1
        cosine, sine = _float(angles, pair), _float(angles, half + pair)
        x, y = _float(numbers, first), _float(numbers, second)
        store32(numbers, first, as_bits(np.float32((x * cosine - y * sine) * scale)))
        store32(numbers, second, as_bits(np.float32((x * sine + y * cosine) * scale)))


@_callback(types.void(_ADDRESS, _ADDRESS))
def turn(operator: int, part: int) -> None:
    """The first half, for every `turn_parts`-th token from `part` on."""
    desk = load64(operator, OF_DESK)
    heads, kv_heads, dim = load64(desk, HEADS), load64(desk, KV_HEADS), load64(desk, DIM)
    kind, interleaved = load64(desk, KIND), load64(desk, INTERLEAVED)
    epsilon, scale = _float(desk, 2 * EPSILON), _float(desk, 2 * SCALE)
    row_bytes = 4 * dim
    source, target = load64(operator, OF_INPUT), load64(operator, OF_OUTPUT)
    layer = load64(operator, OF_LAYER) * load64(desk, LAYER_STEP)
    spare = np.empty(dim, np.float32)
    place = _address_of(spare)
    for token in range(part, load64(desk, TOKENS), load64(desk, TURN_PARTS)):
        angles = load64(desk, ANGLES) + load64(load64(desk, POSITIONS), token) * row_bytes
        come = source + token * (heads + 2 * kv_heads) * row_bytes
        go = target + token * heads * row_bytes
        for _ in range(heads):
            _normed(come, go, dim, load64(operator, OF_Q_NORM), epsilon)
            _turned(go, dim, interleaved, angles, scale)
            come += row_bytes
            go += row_bytes
        cell = load64(load64(desk, CELLS), token) + layer
        for _ in range(kv_heads):
            _normed(come, place, dim, load64(operator, OF_K_NORM), epsilon)
            _turned(place, dim, interleaved, angles, np.float32(1))
            narrow(kind, place, cell, dim)
            narrow(kind, come + kv_heads * row_bytes, cell + load64(desk, KV_STEP), dim)
            come += row_bytes
            cell += load64(desk, HEAD_STEP)
    _keep(spare)


# ---- the second half: one part of the attention


@inlined
def _find(desk: int, table: int, start: int, count: int, offset: int, rows: int) -> None:
    """The addresses of sixteen cells from position `start` on; after `count` the last of them."""
    size, step = load64(desk, BLOCK_TOKENS), load64(desk, TOKEN_STEP)
    block, inside = start // size, start % size
    for token in range(LANES):
        cell = load64(table, block) + inside * step + offset
        store64(rows, token, cell)
        store64(rows, LANES + token, cell + load64(desk, KV_STEP))
        if token + 1 < count:
            inside += 1
            if inside == size:
                inside = 0
                block += 1


@inlined
def _stage(kind: int, dim: int, step: int, rows: int, staged: int) -> None:
    """Widen K and V into rows of whole vectors, and have the addresses name those."""
    for row in range(2 * LANES):
        widen(kind, load64(rows, row), staged + row * step, dim)
        store64(rows, row, staged + row * step)


@inlined
def _score(asked: int, step: int, keys: int, dim: int, shares: int, padded: int) -> None:
    """Sixteen scores of each query; a few are a group of four, more are groups of eight."""
    if padded == 4:
        scores4(asked, step, keys, dim, shares)
    else:
        for query in range(0, padded, 8):
            scores8(asked + query * step, step, keys, dim, shares + query * ROW_BYTES)


@inlined
def _gather(
    shares: int, factors: int, rows: int, valid: int, at: int, sums: int, step: int, padded: int
) -> None:
    """Add sixteen numbers of `valid` weighted values to each query's sums."""
    if padded == 4:
        weigh4(shares, factors, rows, valid, at, sums + at, step)
    else:
        for query in range(0, padded, 8):
            weights, place = shares + query * ROW_BYTES, sums + query * step + at
            weigh8(weights, factors + 4 * query, rows, valid, at, place, step)


@_callback(types.void(_ADDRESS, _ADDRESS))
def attend(operator: int, part: int) -> None:
    """The second half, for one part."""
    desk = load64(operator, OF_DESK)
    dim, kind, heads = load64(desk, DIM), load64(desk, KIND), load64(desk, HEADS)
    group = heads // load64(desk, KV_HEADS)
    told = load64(desk, PARTS) + part * 8 * PART_NUMBERS
    count, position, head = load64(told, COUNT), load64(told, POSITION), load64(told, HEAD)
    row_bytes = 4 * dim
    wide = -(-dim // LANES) * LANES
    step = 4 * wide
    queries = count * group
    padded = 4 if queries <= 4 else (queries + 7) // 8 * 8
    own = load64(operator, OF_OUTPUT)
    own += (load64(told, FIRST) * heads + head * group) * row_bytes

    numbers = np.zeros(padded * (2 * wide + 2 * LANES + 2) + 3 * LANES * wide, np.float32)
    places = np.empty(2 * LANES, np.int64)
    asked = _address_of(numbers)
    sums = asked + padded * step
    shares = sums + padded * step
    totals = shares + padded * ROW_BYTES
    largest = totals + padded * ROW_BYTES
    factors = largest + 4 * padded
    keys = factors + 4 * padded
    staged = keys + LANES * step
    rows = _address_of(places)
    for query in range(queries):
        token, member = query // group, query % group
        copy(asked + query * step, own + (token * heads + member) * row_bytes, row_bytes)
    for query in range(padded):
        store32(largest, query, as_bits(np.float32(-np.inf)))

    offset = load64(operator, OF_LAYER) * load64(desk, LAYER_STEP) + head * load64(desk, HEAD_STEP)
    end = position + count
    for start in range(0, end, LANES):
        valid = min(LANES, end - start)
        _find(desk, load64(told, TABLE), start, valid, offset, rows)
        if kind != FLOAT32 or wide != dim:
            _stage(kind, dim, step, rows, staged)
        for at in range(0, wide, LANES):
            transpose(rows, 4 * at, keys + at * ROW_BYTES)
        _score(asked, step, keys, dim, shares, padded)
        for query in range(queries):
            seen = position + query // group + 1 - start
            factor = soften(
                shares + query * ROW_BYTES, seen, largest + 4 * query, totals + query * ROW_BYTES
            )
            store32(factors, query, as_bits(factor))
        for at in range(0, step, ROW_BYTES):
            _gather(shares, factors, rows + 8 * LANES, valid, at, sums, step, padded)

    for query in range(queries):
        total = np.float32(0)
        for lane in range(LANES):
            total += _float(totals + query * ROW_BYTES, lane)
        token, member = query // group, query % group
        target = own + (token * heads + member) * row_bytes
        for i in range(dim):
            store32(target, i, as_bits(np.float32(_float(sums + query * step, i) / total)))
    _keep(numbers)
    _keep(places)


# ---- what ONNX Runtime calls


@_callback(types.int64(_ADDRESS, _ADDRESS))
def compute(operator: int, context: int) -> int:
    """Both halves for one layer; the address of an error, or 0."""
    desk = load64(operator, OF_DESK)
    came, goes = operator + 8 * OF_INPUT, operator + 8 * OF_OUTPUT
    shape = operator + 8 * OF_SHAPE
    store64(shape, 0, load64(desk, TOKENS))
    store64(shape, 1, load64(desk, HEADS) * load64(desk, DIM))
    failed: int = call3(load64(desk, GET_INPUT), context, 0, came)
    if failed == 0:
        failed = call2(load64(desk, DATA), load64(came, 0), came)
    if failed == 0:
        failed = call5(load64(desk, GET_OUTPUT), context, 0, shape, 2, goes)
    if failed == 0:
        failed = call2(load64(desk, DATA), load64(goes, 0), goes)
    if failed != 0:
        return failed
    parts = load64(desk, TURN_PARTS)
    failed = call5(load64(desk, PARALLEL_FOR), context, load64(desk, TURN), parts, parts, operator)
    if failed == 0 and load64(desk, READY) != 0:
        call1(load64(desk, READY), load64(operator, OF_LAYER))
    if failed == 0:
        parts = load64(desk, PART_COUNT)
        failed = call5(
            load64(desk, PARALLEL_FOR), context, load64(desk, PART), parts, parts, operator
        )
    return failed
