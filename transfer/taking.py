"""Receive runs and hash them at once, while what one call to the kernel brought is in the cache."""

from __future__ import annotations

import numpy as np

from transfer.kernels import U64, Form, Step, Table, add_tiles, address_in
from transfer.raw import compiled
from transfer.rounding import item_bytes
from transfer.sockets import I64, LEFT, TAKEN_BYTES, work_once
from transfer.walking import COUNT, TARGET

UNLIKE = -2
"""The tiles do not lie one after the other where the runs are; some of them may be hashed."""

LAYER, STRIP, RUN, WITHIN, DUE = range(5)
"""What was hashed so far: in which layer which strip, in which run how many bytes, how many yet."""


@compiled
def take(
    descriptor: int, addresses: I64, lengths: I64, state: I64, room: int, hashed: I64,
    strips: I64, steps: Step, first: int, last: int, source: Table, layer_places: int,
    source_scales: Table, scales: int, form: Form, keys: U64, key: int, scratch: int, apart: int,
    sums: U64,
) -> int:  # fmt: skip
    """As `sockets.work_off` for a socket that is read; what has come is added to `sums`.

    Each tile is hashed where it lies, and only if all of it is known to have come: the tiles must
    follow each other in memory as the runs do.
    """
    tile_bytes = form[3] * item_bytes(form[2])
    while state[LEFT]:
        error = work_once(descriptor, 0, addresses, lengths, state, room, TAKEN_BYTES)
        if error:
            return error
        while hashed[LAYER] < last:
            begin = hashed[STRIP]
            end = begin
            while end < len(strips):
                size = strips[end, COUNT] * tile_bytes
                if hashed[DUE] - size < state[LEFT]:
                    break
                run, within = hashed[RUN], hashed[WITHIN]
                place = address_in(source, strips[end, TARGET], hashed[LAYER])
                if addresses[run] + within != place or within + size > lengths[run]:
                    return UNLIKE
                whole = within + size == lengths[run]
                hashed[RUN], hashed[WITHIN] = (run + 1, 0) if whole else (run, within + size)
                hashed[DUE] -= size
                end += 1
            layer = hashed[LAYER]
            add_tiles(
                strips[begin:end], steps, layer, layer + 1, source, layer_places, source_scales,
                scales, form, keys, key, scratch, apart, sums,
            )  # fmt: skip
            hashed[STRIP] = end
            if end < len(strips):
                break
            hashed[LAYER], hashed[STRIP] = layer + 1, 0
    return 0


def begin(first: int, size: int) -> I64:
    """Nothing of `size` bytes, from layer `first` on, has been hashed yet."""
    return np.array([first, 0, 0, 0, size], np.int64)


NOTHING = begin(0, 0)
