"""One prefix becomes the sequences that continue it: which blocks they share, which they copy."""

from __future__ import annotations

from backends.host.ledger import Holder, Ledger
from backends.host.work import Held, Running, sequences_of
from backends.protocol import First, RequestSpec


def share_out(
    ledger: Ledger,
    block_tokens: int,
    held: Held,
    spec: RequestSpec,
    firsts: tuple[First, ...],
    blocks: list[int],
    *,
    max_tokens: int,
    deadline: float,
    written: bool = True,
) -> tuple[list[Running], list[tuple[int, int]]]:
    """The sequences that go on after `firsts`, and the (source, target) blocks to copy for them.

    They share the prefix in `blocks`. A last block that is not full cannot be shared where their
    next tokens are `written` to it: each sequence but one gets a copy, so there must be a free
    block for each.
    """
    first_of = {first.index: first for first in firsts}
    full, rest = divmod(len(spec.prefix), block_tokens)
    copies: list[tuple[int, int]] = []
    started: list[Running] = []
    for one, sequence in zip(spec.sequences, sequences_of(spec), strict=True):
        first = first_of.get(one.index)
        if first is not None and first.finish is not None:
            continue
        if first is not None:
            sequence.generated.append(first.token)
        holder = Holder("decode", f"{held.name}/{one.index}")
        table = list(blocks)
        if rest and started and written:
            table[full:] = ledger.take(1, holder)
            copies.append((blocks[full], table[full]))
            ledger.share(blocks[:full], holder)
        else:
            ledger.share(blocks, holder)
        started.append(
            Running(
                held=held,
                index=one.index,
                sequence=sequence,
                blocks=table,
                holder=holder,
                max_tokens=max_tokens,
                deadline=deadline,
                salt=spec.salt,
            )
        )
    return started, copies
