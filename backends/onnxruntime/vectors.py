"""What attention is made of: sixteen float32 numbers at a time, at bare addresses, as LLVM code.

Each row's arithmetic is the same whatever stands beside it: products are added in the order of
dimensions, then of positions, each by one fused operation. What a row gives therefore depends on
nothing but the row. A machine without vectors of this width computes the same in halves.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from transfer.raw import intrinsic

LANES = 16
ROW_BYTES = 4 * LANES

_ADDRESS: Any = types.int64
_declare: Any = cgutils.get_or_insert_function
_variable: Any = cgutils.alloca_once_value
_WORD, _BIT32, _FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_INTEGERS = ir.VectorType(_BIT32, LANES)

_LOG2E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_LEAST = -87.33654
_SERIES = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1,
           5.0000001201e-1)  # fmt: skip
"""exp on half of ln 2 either way: Cephes (Moshier), good to two units in the last place."""


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder: Any, address: Any) -> Any:
    return builder.load(_pointer(builder, address, _VECTOR), align=4)


def _store(builder: Any, vector: Any, address: Any) -> None:
    builder.store(vector, _pointer(builder, address, _VECTOR), align=4)


def _number(builder: Any, address: Any) -> Any:
    return builder.load(_pointer(builder, address, _FLOAT), align=4)


def _at(builder: Any, address: Any, offset: Any) -> Any:
    if isinstance(offset, int):
        offset = ir.Constant(_WORD, offset)
    return builder.add(address, offset)


def _times(builder: Any, index: Any, factor: int) -> Any:
    return builder.mul(index, ir.Constant(_WORD, factor))


def _splat(builder: Any, number: Any) -> Any:
    first = builder.insert_element(
        ir.Constant(_VECTOR, ir.Undefined), number, ir.Constant(_BIT32, 0)
    )
    order = ir.Constant(_INTEGERS, [0] * LANES)
    return builder.shuffle_vector(first, first, order)


def _constant(number: float) -> Any:
    return ir.Constant(_VECTOR, [number] * LANES)


def _intrinsic(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(result, [it.type for it in arguments])
    function = _declare(builder.module, kind, name)
    return builder.call(function, arguments)


def _fma(builder: Any, first: Any, second: Any, sum_: Any) -> Any:
    return _intrinsic(builder, "llvm.fma.v16f32", _VECTOR, [first, second, sum_])


def _nothing(context: Any) -> Any:
    return context.get_dummy_value()


@intrinsic
def transpose(typing: Any, rows: Any, offset: Any, target: Any) -> Any:
    """Turn sixteen numbers of sixteen rows around.

    `rows` is where the addresses of the rows are; their numbers begin `offset` bytes further.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, offset, target = arguments
        vectors = []
        for number in range(LANES):
            place = _pointer(builder, _at(builder, rows, 8 * number), _WORD)
            vectors.append(_load(builder, _at(builder, builder.load(place, align=8), offset)))
        step = LANES // 2
        while step:
            vectors = _exchanged(builder, vectors, step)
            step //= 2
        for number, vector in enumerate(vectors):
            _store(builder, vector, _at(builder, target, number * ROW_BYTES))
        return _nothing(context)

    return types.void(_ADDRESS, _ADDRESS, _ADDRESS), generate


def _exchanged(builder: Any, vectors: list[Any], step: int) -> list[Any]:
    """Swap the off-diagonal blocks of side `step`: Eklundh's transposition, one stage of it."""
    result = list(vectors)
    low = [it if not it & step else LANES + it - step for it in range(LANES)]
    high = [it + step if not it & step else LANES + it for it in range(LANES)]
    for number in range(LANES):
        if not number & step:
            pair = vectors[number], vectors[number + step]
            result[number] = builder.shuffle_vector(*pair, ir.Constant(_INTEGERS, low))
            result[number + step] = builder.shuffle_vector(*pair, ir.Constant(_INTEGERS, high))
    return result


def _scores(count: int) -> Any:
    def scores(typing: Any, queries: Any, step: Any, keys: Any, dims: Any, target: Any) -> Any:
        """Products of `count` queries, `step` bytes apart, with sixteen transposed keys.

        Each query gives sixteen numbers at `target`.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            queries, step, keys, dims, target = arguments
            sums = [_variable(builder, _constant(0)) for _ in range(count)]
            with cgutils.for_range(builder, dims) as loop:
                column = _load(builder, _at(builder, keys, _times(builder, loop.index, ROW_BYTES)))
                place = _at(builder, queries, _times(builder, loop.index, 4))
                for sum_ in sums:
                    query = _splat(builder, _number(builder, place))
                    builder.store(_fma(builder, query, column, builder.load(sum_)), sum_)
                    place = builder.add(place, step)
            for number, sum_ in enumerate(sums):
                _store(builder, builder.load(sum_), _at(builder, target, number * ROW_BYTES))
            return _nothing(context)

        return types.void(*[_ADDRESS] * 5), generate

    return intrinsic(scores)


scores4, scores8 = _scores(4), _scores(8)


def _weigh(count: int) -> Any:
    def weigh(
        typing: Any, shares: Any, factors: Any, rows: Any, tokens: Any, offset: Any, sums: Any,
        step: Any,
    ) -> Any:  # fmt: skip
        """Multiply `count` sums of sixteen numbers with their factors, and add weighted values.

        `shares` holds sixteen weights for each sum, `rows` the addresses of `tokens` values, whose
        numbers begin `offset` bytes further; the sums are `step` bytes apart.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            shares, factors, rows, tokens, offset, first, step = arguments
            places, sums = [first], []
            while len(places) < count:
                places.append(builder.add(places[-1], step))
            for number, place in enumerate(places):
                factor = _number(builder, _at(builder, factors, 4 * number))
                scaled = builder.fmul(_load(builder, place), _splat(builder, factor))
                sums.append(_variable(builder, scaled))
            with cgutils.for_range(builder, tokens) as loop:
                row = _pointer(builder, _at(builder, rows, _times(builder, loop.index, 8)), _WORD)
                value = _load(builder, _at(builder, builder.load(row, align=8), offset))
                share = _at(builder, shares, _times(builder, loop.index, 4))
                for number, sum_ in enumerate(sums):
                    place = _at(builder, share, number * ROW_BYTES)
                    weight = _splat(builder, _number(builder, place))
                    builder.store(_fma(builder, weight, value, builder.load(sum_)), sum_)
            for place, sum_ in zip(places, sums, strict=True):
                _store(builder, builder.load(sum_), place)
            return _nothing(context)

        return types.void(*[_ADDRESS] * 7), generate

    return intrinsic(weigh)


weigh4, weigh8 = _weigh(4), _weigh(8)


def _exp(builder: Any, exponents: Any) -> Any:
    """E to the power of each; of what is below the smallest normal number's, about that number."""
    least = _constant(_LEAST)
    bounded = builder.select(builder.fcmp_unordered(">", exponents, least), exponents, least)
    turns = builder.fmul(bounded, _constant(_LOG2E))
    whole = _intrinsic(builder, "llvm.nearbyint.v16f32", _VECTOR, [turns])
    rest = _fma(builder, whole, _constant(-_LN2_HIGH), bounded)
    rest = _fma(builder, whole, _constant(-_LN2_LOW), rest)
    series = _constant(_SERIES[0])
    for term in _SERIES[1:]:
        series = _fma(builder, series, rest, _constant(term))
    power = builder.fadd(_fma(builder, builder.fmul(rest, rest), series, rest), _constant(1.0))
    biased = builder.add(builder.fptosi(whole, _INTEGERS), ir.Constant(_INTEGERS, [127] * LANES))
    shifted = builder.shl(biased, ir.Constant(_INTEGERS, [23] * LANES))
    return builder.fmul(power, builder.bitcast(shifted, _VECTOR))


@intrinsic
def soften(typing: Any, scores: Any, valid: Any, largest: Any, total: Any) -> Any:
    """Turn sixteen scores into weights, of which `valid` count; the factor for what was before.

    `largest` is where the largest score so far is kept, `total` where the sixteen sums of weights.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, valid, largest, total = arguments
        lanes = ir.Constant(_INTEGERS, list(range(LANES)))
        bound = builder.insert_element(
            ir.Constant(_INTEGERS, ir.Undefined),
            builder.trunc(valid, _BIT32),
            ir.Constant(_BIT32, 0),
        )
        bound = builder.shuffle_vector(bound, bound, ir.Constant(_INTEGERS, [0] * LANES))
        counts = builder.icmp_signed("<", lanes, bound)
        scores = builder.select(counts, _load(builder, place), _constant(float("-inf")))
        here = _intrinsic(builder, "llvm.vector.reduce.fmax.v16f32", _FLOAT, [scores])
        before = _number(builder, largest)
        new = builder.select(builder.fcmp_ordered(">", here, before), here, before)
        builder.store(new, _pointer(builder, largest, _FLOAT), align=4)
        centre = _splat(builder, new)
        weights = _exp(builder, builder.fsub(scores, centre))
        weights = builder.select(counts, weights, _constant(0))
        factors = _exp(builder, builder.fsub(_splat(builder, before), centre))
        sums = _fma(builder, _load(builder, total), factors, weights)
        _store(builder, weights, place)
        _store(builder, sums, total)
        return builder.extract_element(factors, ir.Constant(_BIT32, 0))

    return types.float32(*[_ADDRESS] * 4), generate


def _calling(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    kind = ir.FunctionType(_WORD, [_WORD] * (len(arguments) - 1))
    return builder.call(_pointer(builder, arguments[0], kind), arguments[1:])


@intrinsic
def call1(typing: Any, function: Any, first: Any) -> Any:
    """What the C function at an address answers."""
    return _ADDRESS(*[_ADDRESS] * 2), _calling


@intrinsic
def call2(typing: Any, function: Any, first: Any, second: Any) -> Any:
    """What the C function at an address answers."""
    return _ADDRESS(*[_ADDRESS] * 3), _calling


@intrinsic
def call3(typing: Any, function: Any, first: Any, second: Any, third: Any) -> Any:
    """What the C function at an address answers."""
    return _ADDRESS(*[_ADDRESS] * 4), _calling


@intrinsic
def call5(
    typing: Any, function: Any, first: Any, second: Any, third: Any, fourth: Any, fifth: Any
) -> Any:
    """What the C function at an address answers."""
    return _ADDRESS(*[_ADDRESS] * 6), _calling
