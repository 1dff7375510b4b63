"""Names for prefixes: a chain of hashes, one link for each full block of tokens.

A link stands for all tokens up to its block's end, in one layout (which names the model and its
weights) and under one salt: two that are equal stand for the same KV. Links of unlike salts never
are, which keeps tenants apart. Workers keep KV under links; gateways compute them to see who has
what. Pure.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from transfer.layout import KVLayout

LINK_BYTES = 16
MARK_BYTES = 8


def chain(
    layout: KVLayout, salt: bytes, tokens: Sequence[int], begun: Sequence[bytes] = ()
) -> list[bytes]:
    """The links of all full blocks of `tokens`; the first of them may be known (`begun`)."""
    size = layout.block_tokens
    links = list(begun)
    if not links:
        root = hashlib.blake2b(salt, digest_size=LINK_BYTES, key=layout.fingerprint.encode())
        link = root.digest()
    else:
        link = links[-1]
    block = struct.Struct(f"<{size}I")
    for start in range(len(links) * size, len(tokens) - size + 1, size):
        data = link + block.pack(*tokens[start : start + size])
        link = hashlib.blake2b(data, digest_size=LINK_BYTES, person=b"baton prefix").digest()
        links.append(link)
    return links


def mark(link: bytes) -> int:
    """The 64 bits of a link that workers publish: enough for advice, not for admission."""
    return int.from_bytes(link[:MARK_BYTES], "big")


def pack(marks: Sequence[int]) -> bytes:
    """Marks one after the other."""
    return struct.pack(f">{len(marks)}Q", *marks)


def unpack(packed: bytes) -> tuple[int, ...]:
    """The reverse of `pack`; what is not whole at the end is left out."""
    count = len(packed) // MARK_BYTES
    return struct.unpack(f">{count}Q", packed[: count * MARK_BYTES])
