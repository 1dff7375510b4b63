"""The paged pool: block ids, reused prefixes, poison where a new owner writes, KV by formula."""

import random
from collections import defaultdict

import numpy as np
import torch

from backends.emulation.pattern import Pattern, prefix_states
from transfer.layout import KVLayout

POISON = 0xAB
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Pool:
    """`tensor` is [blocks, layers, 2, heads * tokens * dim], as the library registers it."""

    def __init__(self, shape, *, blocks, rank, tp, tokens_per_block, order, reuse, nhd):
        layers, heads, dim, dtype = shape
        self.size = tokens_per_block
        self.blocks = blocks
        self._mine = slice(*_heads(rank, tp, heads))
        held = self._mine.stop - self._mine.start
        row = held * tokens_per_block * dim
        self.tensor = torch.empty((blocks, layers, 2, row), dtype=DTYPES[dtype])
        self._bits = self.tensor.view(torch.int32 if dtype == "float32" else torch.int16).numpy()
        self._bits = self._bits.view(np.uint32 if dtype == "float32" else np.uint16)
        # [block, layer, kv, head, token, dim], however the attention kernel lays heads and tokens.
        inner = (tokens_per_block, held, dim) if nhd else (held, tokens_per_block, dim)
        shaped = self._bits.reshape(blocks, layers, 2, *inner)
        self._view = shaped.transpose(0, 1, 2, 4, 3, 5) if nhd else shaped
        whole = KVLayout(
            model="standin",
            weights="standin",
            layers=layers,
            kv_heads=heads,
            head_dim=dim,
            dtype=dtype,
            block_tokens=1,
            rope="half",
        )
        self._pattern = Pattern(whole, np.zeros(whole.block_bytes, np.uint8), 1)
        self._free = list(range(blocks))
        if order == "shuffled":
            random.Random(5).shuffle(self._free)
        self._holders = defaultdict(int)
        self._reuse = reuse
        self._kept = {}  # chain of tokens -> block, the oldest first
        self._chains = {}
        self._fresh = set()  # taken, and not yet written to
        self._poison(range(blocks))

    def _poison(self, blocks):
        for block in blocks:
            self.tensor[block].view(torch.uint8).fill_(POISON)

    def begin_pass(self):
        """What was taken since the last pass now loses what others had written there."""
        self._poison(self._fresh)
        self._fresh = set()

    @property
    def free(self):
        """Blocks that nobody holds."""
        return self.blocks - sum(1 for count in self._holders.values() if count)

    def share(self, tokens, salt):
        """Blocks that hold the beginning of `tokens` already; the last token is never among it."""
        found = []
        for end in range(self.size, len(tokens), self.size):
            block = self._kept.get((salt, tuple(tokens[:end])))
            if block is None:
                break
            self._holders[block] += 1
            found.append(block)
        return found

    def take(self, count):
        return [self._take() for _ in range(count)]

    def _take(self):
        if not self._free:
            chain = next(it for it, block in self._kept.items() if not self._holders[block])
            block = self._kept.pop(chain)
            self._chains.pop(block)
        else:
            block = self._free.pop()
        self._holders[block] += 1
        self._fresh.add(block)
        return block

    def keep(self, blocks, tokens, salt):
        """Let later requests find the blocks of `tokens`. Those that they will find.

        These are other blocks than the request's where an older one had the same tokens.
        """
        if not self._reuse:
            return []
        found = []
        for block, start in zip(blocks, range(0, len(tokens), self.size), strict=False):
            chain = salt, tuple(tokens[: start + self.size])
            if chain not in self._kept:
                self._kept[chain] = block
                self._chains[block] = chain
            found.append(self._kept[chain])
        return found

    def hold(self, blocks):
        """Whoever drops them, they stay until dropped once more."""
        for block in blocks:
            self._holders[block] += 1

    def drop(self, blocks):
        """Give blocks back. What is not kept for reuse is the first to be taken again."""
        for block in blocks:
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            self._fresh.discard(block)
            if block not in self._chains:
                self._free.append(block)

    def write(self, tokens, start, end, blocks):
        """Compute the KV of positions `start` to `end`."""
        states = prefix_states(np.array(tokens[:end], np.uint64), 0, 0)[start:]
        raw = states.view(np.uint8).reshape(-1, 8)
        codes = self._pattern._codes[self._pattern._numbers_at(raw, slice(None))]
        for place, code in enumerate(codes[:, :, :, self._mine], start):
            self._view[blocks[place // self.size], :, :, :, place % self.size] = code


def _heads(rank, tp, heads):
    """The first head of a rank and the end of them; replicated where there are fewer than ranks."""
    if tp <= heads:
        each = heads // tp
        return rank * each, rank * each + each
    first = rank // (tp // heads)
    return first, first + 1
