"""Check the rows of a step before an engine computes them. Pure."""

from __future__ import annotations

from collections.abc import Sequence as Items

import msgspec

from backends.api import Row, StepFailed


class Limits(msgspec.Struct, frozen=True):
    """What rows may not exceed."""

    vocabulary: int
    context_tokens: int
    pool_blocks: int
    block_tokens: int


def check_rows(rows: Items[Row], limits: Limits) -> None:
    """Refuse a row that would read or write outside the model or the pool.

    Raises:
        StepFailed: says which row, and why.
    """
    for number, row in enumerate(rows):
        end = row.start + len(row.tokens)
        if not row.tokens or row.start < 0 or end > limits.context_tokens:
            raise StepFailed(
                f"row {number}: positions {row.start} to {end} of {limits.context_tokens}"
            )
        if len(row.blocks) * limits.block_tokens < end:
            raise StepFailed(f"row {number}: {len(row.blocks)} blocks do not cover {end} tokens")
        if not 0 <= min(row.blocks) <= max(row.blocks) < limits.pool_blocks:
            raise StepFailed(f"row {number}: a block outside the pool of {limits.pool_blocks}")
        if not 0 <= min(row.tokens) <= max(row.tokens) < limits.vocabulary:
            raise StepFailed(f"row {number}: a token outside the vocabulary")
        if row.prompt_logprobs is not None and not (
            len(row.tokens) - 1 <= len(row.following) <= len(row.tokens)
            and all(0 <= token < limits.vocabulary for token in row.following)
        ):
            raise StepFailed(f"row {number}: `following` does not follow its tokens")
