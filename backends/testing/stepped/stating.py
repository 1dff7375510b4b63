"""Promises about what a plug-in says of itself."""

from __future__ import annotations

from backends.api import Sampling
from backends.testing.form import require
from backends.testing.stepped.bench import SteppedBench

LARGEST_VOCABULARY = 1 << 24


def its_statements_make_sense(bench: SteppedBench) -> None:
    """`info` holds no contradiction, and the pool is writable memory of the size it says."""
    desk = bench.desk  # made as a worker makes it, which looks at members and the pool's size
    info, layout = desk.info, desk.layout
    capacity = info.pool_blocks * layout.block_tokens
    fields = set(Sampling.__struct_fields__)
    require(
        1 <= info.vocabulary <= LARGEST_VOCABULARY,
        f"info.vocabulary is {info.vocabulary}; it is the number of token ids",
    )
    strange = [token for token in info.end_tokens if not 0 <= token < info.vocabulary]
    require(not strange, f"info.end_tokens: {strange} are not ids of a vocabulary")
    require(
        info.sampling <= fields,
        f"info.sampling: {sorted(info.sampling - fields)} are no fields of Sampling; "
        f"those are {', '.join(sorted(fields))}",
    )
    require(info.max_batch >= 1, f"info.max_batch is {info.max_batch}; it is at least 1")
    require(
        2 <= info.context_tokens <= capacity,
        f"info.context_tokens is {info.context_tokens}, but the pool holds {capacity} tokens: "
        "state the smaller of the model's limit and that",
    )
    require(
        desk.writable,
        "pool: other workers cannot write to it; offer a writable buffer, as `allocate` makes it",
    )


def it_states_what_its_reference_does(bench: SteppedBench) -> None:
    """Vocabulary and end tokens are those of the reference engine, the context no longer."""
    theirs, ours = bench.reference.info, bench.desk.info
    require(
        ours.vocabulary == theirs.vocabulary,
        f"info.vocabulary is {ours.vocabulary}, that of the reference {theirs.vocabulary}",
    )
    require(
        set(ours.end_tokens) == set(theirs.end_tokens),
        f"info.end_tokens are {sorted(ours.end_tokens)}, those of the reference "
        f"{sorted(theirs.end_tokens)}: a sequence would end elsewhere",
    )
