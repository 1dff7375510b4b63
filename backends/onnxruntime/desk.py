"""What the attention operator is told: once about the pool, before each step about its rows."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from ctypes import CFUNCTYPE, c_int64, c_void_p, cast
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.api import Row
from backends.checkpoint.rope import inverse_frequencies
from backends.checkpoint.spec import ModelSpec, Pairing
from backends.onnxruntime import attention
from backends.onnxruntime.library import Library
from transfer.layout import KVLayout
from transfer.rounding import KIND

I64 = NDArray[np.int64]
Norms = tuple[NDArray[np.float32], NDArray[np.float32]]

_QUERIES = 24
"""About how many queries a part has: enough that a key, once turned around, is used often."""
_TURN_TOKENS = 16
"""So few tokens are not worth a second thread."""


class Desk:
    """The operator's integers, and whatever their addresses point to."""

    def __init__(
        self,
        library: Library,
        spec: ModelSpec,
        layout: KVLayout,
        pairing: Pairing,
        pool: NDArray[Any],
        context: int,
        norms: Items[Norms],
        threads: int,
    ) -> None:
        sizes = layout.sizes(len(pool) // layout.block_bytes)
        steps = _steps(sizes, layout.item_bytes)
        self._block_step, self._token_step = steps["block"], steps["token"]
        self._pool, self._size = pool.ctypes.data, layout.block_tokens
        self._group, self._kv_heads, self._threads = spec.group, spec.kv_heads, threads
        self._angles = _angles(spec, context)
        self._norms = norms
        self._heard: Callable[[int], None] = _nobody
        self._raised: BaseException | None = None
        self._ready = CFUNCTYPE(c_int64, c_int64)(self._hear)
        self._kept: tuple[I64, ...] = ()
        self._desk = np.zeros(len(attention.FIELDS), np.int64)
        self._set(
            get_input=library.address("KernelContext_GetInput"),
            get_output=library.address("KernelContext_GetOutput"),
            data=library.address("GetTensorMutableData"),
            parallel_for=library.address("KernelContext_ParallelFor"),
            turn=attention.turn.address,
            part=attention.attend.address,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            dim=spec.head_dim,
            interleaved=pairing == "interleaved",
            kind=KIND[layout.dtype],
            block_tokens=layout.block_tokens,
            layer_step=steps["layer"],
            kv_step=steps["kv"],
            head_step=steps["head"],
            token_step=steps["token"],
            epsilon=_bits(spec.norm_epsilon),
            angles=self._angles.ctypes.data,
            scale=_bits(spec.head_dim**-0.5),
        )
        self._operators = np.zeros((layout.layers, attention.OPERATOR_NUMBERS), np.int64)
        self._operators[:, attention.OF_DESK] = self._desk.ctypes.data
        self._operators[:, attention.OF_LAYER] = np.arange(layout.layers)
        for layer, (q_norm, k_norm) in enumerate(norms):
            self._operators[layer, attention.OF_Q_NORM] = q_norm.ctypes.data
            self._operators[layer, attention.OF_K_NORM] = k_norm.ctypes.data

    def operator(self, layer: int) -> int:
        """The address that the operator of a layer is given."""
        return int(self._operators[layer].ctypes.data)

    def lay(self, rows: Items[Row], heard: Callable[[int], None] | None) -> I64:
        """Lay out one step over checked rows; their tokens one after the other.

        `heard(layer)`, unless it is None, is called when the KV of all rows is final in a layer.
        """
        counts = np.array([len(row.tokens) for row in rows])
        starts = np.array([row.start for row in rows])
        firsts = np.cumsum(counts) - counts
        row_of = np.repeat(np.arange(len(rows)), counts)
        positions = np.arange(len(row_of)) - firsts[row_of] + starts[row_of]
        tables = np.concatenate([np.array(row.blocks) for row in rows])
        tables = tables * self._block_step + self._pool
        lengths = np.array([len(row.blocks) for row in rows])
        tables_at = np.cumsum(lengths) - lengths
        cells = tables[tables_at[row_of] + positions // self._size]
        cells += positions % self._size * self._token_step
        parts = self._parts(firsts, counts, starts, tables.ctypes.data + 8 * tables_at)
        self._kept = positions, cells, tables, parts
        self._heard = heard or _nobody
        self._set(
            ready=int(cast(self._ready, c_void_p).value or 0) if heard else 0,
            tokens=len(positions),
            positions=positions.ctypes.data,
            cells=cells.ctypes.data,
            parts=parts.ctypes.data,
            part_count=len(parts),
            turn_parts=1 if len(positions) < _TURN_TOKENS else 4 * self._threads,
        )
        return np.array([token for row in rows for token in row.tokens])

    def raise_heard(self) -> None:
        """Raise what `heard` raised, if it did."""
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised

    def _parts(self, firsts: I64, counts: I64, starts: I64, tables: I64) -> I64:
        """Cut rows into parts for each KV head, the largest first."""
        most = max(1, _QUERIES // self._group)
        cuts = -(-counts // most)
        row = np.repeat(np.arange(len(counts)), cuts)
        done = (np.arange(len(row)) - (np.cumsum(cuts) - cuts)[row]) * most
        tokens = np.minimum(most, counts[row] - done)
        found = np.stack([firsts[row] + done, tokens, starts[row] + done, done, tables[row]], 1)
        parts = np.repeat(found, self._kv_heads, axis=0)
        parts[:, attention.HEAD] = np.tile(np.arange(self._kv_heads), len(found))
        work = parts[:, attention.COUNT] * (
            parts[:, attention.POSITION] + parts[:, attention.COUNT]
        )
        ordered: I64 = parts[np.argsort(-work, kind="stable")]
        return ordered

    def _hear(self, layer: int) -> int:
        """Called from inside the graph, where nothing may be raised."""
        try:
            self._heard(layer)
        except BaseException as error:
            self._raised = error
        return 0

    def _set(self, **fields: int) -> None:
        for name, value in fields.items():
            self._desk[attention.FIELDS.index(name)] = value


def _nobody(_layer: int) -> None:
    """Hears that a layer is final."""


def _steps(sizes: dict[str, int], item_bytes: int) -> dict[str, int]:
    """How many bytes apart neighbours of each axis are."""
    steps, step = {}, item_bytes
    for axis, size in reversed(sizes.items()):
        steps[axis] = step
        step *= size
    return steps


def _angles(spec: ModelSpec, context: int) -> NDArray[np.float32]:
    """Cosine and sine of each pair's angle, [position, dim]."""
    angles = np.outer(np.arange(context), inverse_frequencies(spec))
    return np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


def _bits(number: float) -> int:
    return int(np.float32(number).view(np.uint32))
