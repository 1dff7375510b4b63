"""Plug-ins that compute something else, now and then."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from backends.api import Output, Row, Sampled
from tests.conformance.mutants.sound import Apart, Sound, breaks, replace


@breaks("every_row_is_answered")
class AnswersBackwards(Sound):
    def step(self, batch, ready):
        order = [it for it, row in enumerate(batch) if len(row.sequences) == 1]
        outputs = super().step(batch, ready)
        answers = [outputs[it].sampled for it in order]
        for it, sampled in zip(order, answers[::-1], strict=True):
            outputs[it] = replace(outputs[it], sampled=sampled)
        return outputs


@breaks("every_row_is_answered")
class ArrayTokens(Sound):
    def step(self, batch, ready):
        def strange(output: Output) -> Output:
            sampled = [Sampled(np.int64(it.token), it.logprob) for it in output.sampled]
            return replace(output, sampled=tuple(sampled))

        return [strange(output) for output in super().step(batch, ready)]


@breaks("every_position_is_written_in_every_layer")
class ForgetsToPublish(Apart):
    def publish(self, blocks):
        super().publish(list(blocks)[:-1])


@breaks("garbage_in_the_pool_does_no_harm")
class ReadsTheRest(Sound):
    """As one that multiplies by a mask of zeros instead of leaving out."""

    def step(self, batch, ready):
        return super().step([self._tainted(row) for row in batch], ready)

    def _tainted(self, row: Row) -> Row:
        if np.isnan(self.bytes_of(row.blocks[-1]).view(np.float32)).any():
            return replace(row, tokens=[0] * len(row.tokens))
        return row


@breaks("logits_agree_with_the_reference")
class OtherWeights(Sound):
    def begin(self):
        self.change_weights()


@breaks("a_prompt_in_chunks_is_the_same_prompt")
class ForgetsEarlierChunks(Sound):
    def step(self, batch, ready):
        return super().step([self._cut(row) for row in batch], ready)

    def _cut(self, row: Row) -> Row:
        if row.start and len(row.tokens) > 1:
            self.bytes_of(row.blocks[0])[:] = 0
        return row


@breaks("a_batch_does_not_change_its_rows")
class LooksAtNeighbours(Sound):
    def step(self, batch, ready):
        singles = [row for row in batch if len(row.tokens) == 1 and row.start]
        if len(singles) > 1:
            first = singles[0].tokens
            batch = [replace(row, tokens=first) if row in singles else row for row in batch]
        return super().step(batch, ready)


@breaks("sequences_share_a_prefix")
class WritesWholeTables(Sound):
    """Clears what follows a row's end in every block of its table that another row begins in."""

    def step(self, batch, ready):
        seen = set(itertools.chain.from_iterable(row.blocks for row in batch[:1]))
        for row in batch[1:]:
            for block in seen & set(row.blocks):
                self.bytes_of(block)[:] = 0
        return super().step(batch, ready)


@breaks("blocks_may_be_used_again")
class CachesByBlocks(Sound):
    def begin(self):
        self._known: dict[Any, Output] = {}

    def step(self, batch, ready):
        outputs = super().step(batch, ready)
        return [
            self._known.setdefault((tuple(row.blocks), row.start, len(row.tokens)), output)
            for row, output in zip(batch, outputs, strict=True)
        ]


@breaks("prompt_logprobs_agree_with_decoding")
class PromptLogprobsOfTheWrongToken(Sound):
    def step(self, batch, ready):
        return super().step(
            [replace(row, following=row.tokens[: len(row.following)]) for row in batch], ready
        )
