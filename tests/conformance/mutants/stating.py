"""Plug-ins that say what is not so."""

from __future__ import annotations

from backends.api import StepFailed
from tests.conformance.mutants.sound import Sound, breaks, fields, replace


@breaks("its_statements_make_sense")
class UnknownParameter(Sound):
    stated = fields(sampling=frozenset({"temperature", "top_q"}))


@breaks("its_statements_make_sense")
class ReadOnlyPool(Sound):
    def begin(self):
        self.pool = bytes(self.pool)


@breaks("it_states_what_its_reference_does")
class OtherEndTokens(Sound):
    stated = fields(end_tokens=(5, 6))


@breaks("it_continues_what_the_reference_computed")
class OtherPairing(Sound):
    layout = fields(rope="interleaved")


@breaks("the_reference_continues_what_it_computed")
class OtherPairingToo(OtherPairing):
    pass


@breaks("it_continues_what_the_reference_computed")
class OtherAxes(Sound):
    layout = fields(axes="block layer head kv token dim")


@breaks("it_writes_only_where_its_rows_lie")
class TokensElsewhere(Sound):
    layout = fields(axes="block layer kv token head dim")


@breaks("every_layout_it_offers_is_true")
class DeafToAxes(Sound):
    def __init__(self, *, axes: str = "", **options):
        super().__init__(**options)


@breaks("decoding_agrees_with_prefill")
class NotQuiteExact(Sound):
    stated = fields(continuation="exact")


@breaks("it_holds_what_it_states")
class KeepsABlock(Sound):
    def step(self, batch, ready):
        outputs = super().step(batch, ready)
        self.bytes_of(7)[:] = 0
        return outputs


@breaks("it_reads_to_the_end_of_its_context")
class ReadsLess(Sound):
    def step(self, batch, ready):
        if any(row.start + len(row.tokens) > 200 for row in batch):
            raise StepFailed("out of memory")
        return super().step(batch, ready)


@breaks("a_full_batch_is_computed")
class ComputesFewer(Sound):
    def step(self, batch, ready):
        if len(batch) > 20:
            raise StepFailed("no kernel for so many rows")
        return super().step(batch, ready)


@breaks("it_refuses_what_is_beyond_it")
class WrapsBlocks(Sound):
    def step(self, batch, ready):
        blocks = self.info.pool_blocks
        return super().step(
            [replace(row, blocks=[it % blocks for it in row.blocks]) for row in batch], ready
        )
