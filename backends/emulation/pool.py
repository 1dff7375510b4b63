"""The paged KV pool: one buffer in whatever axes order its layout says, read and written by cell.

A *cell* is the `head_dim` numbers of one (layer, K|V, block, token, head); since `dim` is always
innermost, a cell is contiguous in every layout, and an address is one integer. Where `token` is
next to innermost, all of a block's tokens of one head lie together and are gathered as one *run*.

Reads may cover the unwritten end of a sequence's last block, whose weights in the softmax are
zero; but zero times a NaN left there by a broken transfer is a NaN, so `begin` clears the rest
of a block whenever a sequence starts to write into it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from backends.api import allocate
from backends.emulation.staging import Staging
from transfer.layout import DType, KVLayout, Shard

TORCH_DTYPES: dict[DType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

_CANONICAL = ("layer", "kv", "block", "token", "head", "dim")
_UNKNOWN = -1
Indexes = npt.NDArray[np.int64]


def _nobody() -> None:
    """Hears that something has landed."""


class PagedPool:
    """`blocks` blocks of KV on `device`, and the buffer in host memory that others see.

    With `shadow` (needed where the device is not the CPU) that buffer is a copy: `publish`
    brings it up to date, `ingest` takes what others wrote there (see `staging.py`). Otherwise
    the two are the same memory.
    """

    def __init__(
        self,
        layout: KVLayout,
        blocks: int,
        device: str,
        *,
        shadow: bool | None = None,
        shards: tuple[Shard, ...] = (),
    ) -> None:
        """Take memory for `blocks` blocks: one pool, or one after the other for each of `shards`.

        Those have as many heads each.
        """
        self.layout = layout
        self.shadowed = device != "cpu" if shadow is None else shadow
        nbytes = layout.block_bytes * blocks
        self.buffer = allocate(nbytes)
        self.buffers = np.split(self.buffer, max(1, len(shards)))
        host = torch.from_numpy(self.buffer)
        raw = torch.zeros(nbytes, dtype=torch.uint8, device=device) if self.shadowed else host
        cuts = layout.sharded(shards)
        self._host = [_canonical(*it, blocks) for it in zip(cuts, _split(host, cuts), strict=True)]
        self._pools = [_canonical(*it, blocks) for it in zip(cuts, _split(raw, cuts), strict=True)]
        self._staging = Staging(self._pools[0], self._host[0]) if self.shadowed else None
        numbers = raw.view(TORCH_DTYPES[layout.dtype])
        self.by_token = layout.axes.split()[-2] != "token"
        self.dtype = numbers.dtype
        self.run_numbers = layout.head_dim * (1 if self.by_token else layout.block_tokens)
        self._strides = dict(zip(_CANONICAL, self._pools[0].stride(), strict=True))
        self._heads = _head_offsets(cuts, self._strides["head"], len(numbers) // len(cuts))
        starts = [layer * self._strides["layer"] for layer in range(layout.layers)]
        self._cells = [numbers[start:].view(-1, layout.head_dim) for start in starts]
        self._runs = [numbers[start:].view(-1, self.run_numbers) for start in starts]
        self._filled = np.full(blocks, _UNKNOWN, np.int64)

    @property
    def canonical(self) -> torch.Tensor:
        """The only pool, of shape [layer, K|V, block, token, head, dim]."""
        (pool,) = self._pools
        return pool

    # ---- addresses -------------------------------------------------------------------------

    def cells_of(self, blocks: Indexes, tokens: Indexes) -> Indexes:
        """Addresses in layer 0 of the tokens at these places: [K|V, head, token], flattened."""
        unit = self.layout.head_dim
        base = (blocks * self._strides["block"] + tokens * self._strides["token"]) // unit
        return (base + self._inner(unit)[:, :, None]).reshape(-1)

    def runs_of(self, blocks: Indexes) -> Indexes:
        """Addresses in layer 0 of whole blocks: `blocks` is [row, block].

        The result, flattened, gathers to [K|V, row, head, token, dim].
        """
        if not self.by_token:
            unit = self.layout.head_dim * self.layout.block_tokens
            base = blocks * self._strides["block"] // unit
        else:
            unit = self.layout.head_dim
            places = np.arange(self.layout.block_tokens) * self._strides["token"]
            base = (blocks[:, :, None] * self._strides["block"] + places).reshape(
                len(blocks), -1
            ) // unit
        return (base[None, :, None, :] + self._inner(unit)[:, None, :, None]).reshape(-1)

    def _inner(self, unit: int) -> Indexes:
        kv = np.arange(2) * self._strides["kv"]
        inner: Indexes = (kv[:, None] + self._heads) // unit
        return inner

    # ---- the engine's side -----------------------------------------------------------------

    def begin(self, blocks: Indexes, first: Indexes, last: Indexes) -> None:
        """Prepare to write tokens `first` to `last` (inclusive, within the block) of `blocks`.

        Clears what follows `last` unless that is known to be clear.
        """
        known = (self._filled[blocks] == first) & (first > 0)
        self._filled[blocks] = last + 1
        unclear = ~known & (last + 1 < self.layout.block_tokens)
        for block, end in zip(blocks[unclear].tolist(), last[unclear].tolist(), strict=True):
            for pool in self._pools:
                pool[:, :, block, end + 1 :] = 0

    def write(self, layer: int, cells: torch.Tensor, kv: torch.Tensor) -> None:
        """Store `kv`, [K|V, head, token, dim] in the pool's dtype, at cells from `cells_of`."""
        self._cells[layer].index_copy_(0, cells, kv.view(-1, self.layout.head_dim))

    def gather(self, layer: int, runs: torch.Tensor, out: torch.Tensor) -> None:
        """Read runs, as `runs_of` gave them, into `out`, shaped [run, `run_numbers`]."""
        torch.index_select(self._runs[layer], 0, runs, out=out)

    # ---- the host's side -------------------------------------------------------------------

    def publish(
        self, blocks: torch.Tensor, layer: int | None = None, landed: Callable[[], None] = _nobody
    ) -> None:
        """Bring the host's copy of these blocks up to date, in one layer or in all.

        `landed` is called once that is so: here, or in a later call or `settle`.
        """
        if self._staging is None:
            landed()
            return
        layers = slice(None) if layer is None else slice(layer, layer + 1)
        self._staging.send(layers, blocks, landed)

    def settle(self) -> None:
        """Return when all that was published is in the host's copy."""
        if self._staging is not None:
            self._staging.collect(wait=True)

    def abandon(self) -> None:
        """Forget what was published and has not landed: its step failed."""
        if self._staging is not None:
            self._staging.abandon()

    def ingest(self, blocks: Indexes) -> None:
        """Take these blocks from the host's copy; others wrote them."""
        self._filled[blocks] = _UNKNOWN
        if self._staging is not None:
            self._staging.fetch(torch.from_numpy(blocks))

    def copy(self, sources: Indexes, targets: Indexes) -> None:
        """Copy blocks, all layers, in the engine's memory and in the host's."""
        self._filled[targets] = self._filled[sources]
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            for pool in self._pools if self._staging is None else [*self._pools, *self._host]:
                pool[:, :, target] = pool[:, :, source]


def _split(memory: torch.Tensor, cuts: tuple[KVLayout, ...]) -> list[torch.Tensor]:
    return list(memory.view(len(cuts), -1))


def _canonical(layout: KVLayout, memory: torch.Tensor, blocks: int) -> torch.Tensor:
    """One pool as [layer, K|V, block, token, head, dim]."""
    axes = layout.axes.split()
    sizes = list(layout.sizes(blocks).values())
    shaped = memory.view(TORCH_DTYPES[layout.dtype]).view(sizes)
    return shaped.permute([axes.index(axis) for axis in _CANONICAL])


def _head_offsets(cuts: tuple[KVLayout, ...], stride: int, apart: int) -> Indexes:
    """How far from the first head each head lies: the pools are `apart` numbers from each other."""
    pools = np.arange(len(cuts)) * apart
    heads = np.arange(cuts[0].heads.count) * stride
    offsets: Indexes = (pools[:, None] + heads).reshape(-1)
    return offsets
