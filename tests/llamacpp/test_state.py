"""The bytes of llama.cpp's sequence state, without llama.cpp: built, read back, damaged."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.errors import BackendMisconfigured, StepFailed
from backends.llamacpp.state import TYPES, Form, State, check_probe

HALF = Form(layers=3, numbers=4, dtype="float16", transposed=False)
FULL = Form(layers=2, numbers=3, dtype="float32", transposed=True)
FORMS = pytest.mark.parametrize("form", [HALF, FULL], ids=["float16", "float32"])
HEADER_BYTES = 16
CELL_BYTES = 12


def as_written(positions: list[int], kv: np.ndarray, form: Form) -> bytes:
    """What llama.cpp writes for these cells: `kv` is [K|V, layer, cell, number]."""
    kind, size = TYPES[form.dtype], form.item.itemsize
    parts = [struct.pack("<IiII", 0xAF143CD8, 7, 1, len(positions))]
    parts += [struct.pack("<iIi", position, 1, 7) for position in positions]
    parts.append(struct.pack("<II", form.transposed, form.layers))
    for plane in kv[0]:
        parts += [struct.pack("<iQ", kind, form.numbers * size), plane.tobytes()]
    for plane in kv[1]:
        if form.transposed:
            parts += [struct.pack("<iII", kind, size, form.numbers), plane.T.tobytes()]
        else:
            parts += [struct.pack("<iQ", kind, form.numbers * size), plane.tobytes()]
    return b"".join(parts)


def numbers(cells: int, form: Form) -> np.ndarray:
    shape = (2, form.layers, cells, form.numbers)
    return np.random.default_rng(cells).integers(0, 1 << 16, shape).astype(form.item)


def received(raw: bytes, cells: int, form: Form) -> State:
    state = State(form, cells)
    state.raw[:] = np.frombuffer(raw, np.uint8)
    return state


def holds(state: State, kv: np.ndarray) -> bool:
    return np.array_equal(state.keys, kv[0]) and np.array_equal(state.values, kv[1])


@FORMS
def test_a_state_that_is_built_is_what_llama_cpp_would_write(form: Form) -> None:
    state, wanted = State(form, 5), numbers(5, form)
    state.begin(11)
    state.keys[...], state.values[...] = wanted
    written = as_written([11, 12, 13, 14, 15], wanted, form)
    here, there = bytearray(state.raw), bytearray(written)
    for copy in (here, there):  # which sequence it was does not matter: the reader names its own
        for at in (4, *range(HEADER_BYTES + 8, HEADER_BYTES + 5 * CELL_BYTES, CELL_BYTES)):
            copy[at : at + 4] = bytes(4)
    assert here == there


@FORMS
@given(order=st.permutations(range(9)), first=st.integers(0, 1 << 20))
def test_numbers_come_in_the_order_of_positions_whatever_cells_they_are_in(
    form: Form, order: list[int], first: int
) -> None:
    wanted = numbers(9, form)
    written = as_written([first + it for it in order], wanted[:, :, order], form)
    state = received(written, 9, form)
    state.check(first)
    assert holds(state, wanted)


@FORMS
@given(data=st.data())
def test_a_damaged_state_is_refused_or_holds_other_numbers(form: Form, data) -> None:
    """No byte but those of numbers and of sequences' names goes unnoticed."""
    cells = data.draw(st.integers(1, 4))
    raw = bytearray(as_written(list(range(cells)), numbers(cells, form), form))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    state = received(bytes(raw), cells, form)
    try:
        state.check(0)
    except StepFailed:
        return
    cell = at - HEADER_BYTES
    name = 4 <= at < 8 or (0 <= cell < cells * CELL_BYTES and cell % CELL_BYTES >= 8)
    assert name or not holds(state, numbers(cells, form))


@FORMS
@given(raw=st.binary(max_size=400))
def test_any_other_bytes_are_refused_as_a_probe(form: Form, raw: bytes) -> None:
    with pytest.raises(BackendMisconfigured, match="not known"):
        check_probe(form, raw)


@FORMS
def test_a_probe_of_the_known_form_is_accepted(form: Form) -> None:
    check_probe(form, as_written([0], numbers(1, form), form))


@pytest.mark.parametrize(
    ("other", "seen"),
    [
        (Form(3, 4, "float32", False), "has 204 bytes where 156 were expected"),
        (Form(3, 8, "float16", False), "has 204 bytes where 156 were expected"),
        (Form(4, 4, "float16", False), "has 196 bytes where 156 were expected"),
        (Form(3, 4, "float16", True), "V transposed 1 instead of 0, V of layer 0 beginning with"),
    ],
    ids=["type", "row size", "layers", "transposed"],
)
def test_a_probe_of_another_form_is_refused_with_what_was_seen(other: Form, seen: str) -> None:
    with pytest.raises(BackendMisconfigured, match=seen):
        check_probe(HALF, as_written([0], numbers(1, other), other))


@pytest.mark.parametrize(
    ("at", "value", "seen"),
    [
        (0, 0x67676D6C, "magic 0x67676d6c instead of 0xaf143cd8"),
        (8, 2, "streams 2 instead of 1"),
        (12, 3, "cells 3 instead of 1"),
        (20, 2, "cells of several sequences"),
        (28, 1, "V transposed 1 instead of 0"),
        (32, 4, "layers 4 instead of 3"),
        (36, 30, "K of layer 0 beginning with 1e000000 .* instead of 01000000"),
        (16, 5, "positions 5 to 5"),
    ],
)
def test_a_probe_with_another_field_is_refused_with_what_was_seen(
    at: int, value: int, seen: str
) -> None:
    raw = bytearray(as_written([0], numbers(1, HALF), HALF))
    raw[at : at + 4] = struct.pack("<I", value)
    with pytest.raises(BackendMisconfigured, match=seen):
        check_probe(HALF, bytes(raw))
