"""The promises of a stepped backend, a file for each kind of them.

`STEPPED` is the list, from what a plug-in says to what becomes of it in a worker: whoever writes
one goes through it from the top.
"""

from __future__ import annotations

from backends.testing.bench import SteppedBench
from backends.testing.form import Promise
from backends.testing.stepped.computing import (
    a_batch_does_not_change_its_rows,
    a_prompt_in_chunks_is_the_same_prompt,
    decoding_agrees_with_prefill,
    every_row_is_answered,
    prompt_logprobs_agree_with_decoding,
    sequences_share_a_prefix,
)
from backends.testing.stepped.stating import (
    it_states_what_its_reference_does,
    its_statements_make_sense,
)

__all__ = ["STEPPED"]

STEPPED: tuple[Promise[SteppedBench], ...] = (
    its_statements_make_sense,
    it_states_what_its_reference_does,
    every_row_is_answered,
    a_prompt_in_chunks_is_the_same_prompt,
    decoding_agrees_with_prefill,
    a_batch_does_not_change_its_rows,
    sequences_share_a_prefix,
    prompt_logprobs_agree_with_decoding,
)
