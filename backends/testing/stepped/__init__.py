"""The promises of a stepped backend, a file for each kind of them.

`STEPPED` is the list, from what a plug-in says to what becomes of it in a worker: whoever writes
one goes through it from the top.
"""

from __future__ import annotations

from backends.testing.choosing import SAMPLING
from backends.testing.form import Promise
from backends.testing.stepped.bench import SteppedBench
from backends.testing.stepped.computing import (
    a_batch_does_not_change_its_rows,
    a_prompt_in_chunks_is_the_same_prompt,
    decoding_agrees_with_prefill,
    every_row_is_answered,
    prompt_logprobs_agree_with_decoding,
    sequences_share_a_prefix,
)
from backends.testing.stepped.drawing import (
    a_seeded_text_goes_on_elsewhere,
    positions_draw_anew,
    seeds_repeat_and_differ,
)
from backends.testing.stepped.ending import (
    a_cancel_at_any_point_disturbs_nobody,
    a_step_that_fails_loses_no_more_than_itself,
    blocks_may_be_used_again,
    made_again_it_computes_the_same,
)
from backends.testing.stepped.handing import (
    decode_after_handoff_equals_decode_in_place,
    every_layout_it_offers_is_true,
    it_continues_what_the_reference_computed,
    kv_survives_every_layout,
    logits_agree_with_the_reference,
    the_reference_continues_what_it_computed,
)
from backends.testing.stepped.hosting import (
    a_cancel_frees_every_block,
    a_worker_continues_what_another_computed,
    a_worker_continues_what_the_reference_computed,
    a_worker_refuses_what_it_cannot_do,
    a_worker_says_what_it_says,
    a_worker_whose_step_hangs_ends,
    in_a_new_process_it_computes_the_same,
    sequences_end_where_they_are_told,
)
from backends.testing.stepped.limits import (
    a_full_batch_is_computed,
    it_holds_what_it_states,
    it_reads_to_the_end_of_its_context,
    it_refuses_what_is_beyond_it,
)
from backends.testing.stepped.placing import (
    a_layer_that_is_ready_is_final,
    copied_blocks_are_equal,
    every_position_is_written_in_every_layer,
    garbage_in_the_pool_does_no_harm,
    it_writes_only_where_its_rows_lie,
    nothing_is_written_after_a_step,
)
from backends.testing.stepped.stating import (
    it_states_what_its_reference_does,
    its_statements_make_sense,
)

__all__ = ["STEPPED", "STEPPED_CORE"]

STEPPED_CORE = (
    "decode_after_handoff_equals_decode_in_place",
    "it_continues_what_the_reference_computed",
    "the_reference_continues_what_it_computed",
    "a_cancel_at_any_point_disturbs_nobody",
    "a_cancel_frees_every_block",
)
"""That KV means what is stated, and that a cancel leaves nothing behind."""

STEPPED: tuple[Promise[SteppedBench], ...] = (
    its_statements_make_sense,
    it_states_what_its_reference_does,
    every_row_is_answered,
    every_position_is_written_in_every_layer,
    garbage_in_the_pool_does_no_harm,
    it_writes_only_where_its_rows_lie,
    a_prompt_in_chunks_is_the_same_prompt,
    decoding_agrees_with_prefill,
    a_batch_does_not_change_its_rows,
    sequences_share_a_prefix,
    blocks_may_be_used_again,
    copied_blocks_are_equal,
    decode_after_handoff_equals_decode_in_place,
    kv_survives_every_layout,
    logits_agree_with_the_reference,
    it_continues_what_the_reference_computed,
    the_reference_continues_what_it_computed,
    every_layout_it_offers_is_true,
    nothing_is_written_after_a_step,
    a_layer_that_is_ready_is_final,
    *SAMPLING,
    seeds_repeat_and_differ,
    positions_draw_anew,
    a_seeded_text_goes_on_elsewhere,
    prompt_logprobs_agree_with_decoding,
    it_holds_what_it_states,
    it_reads_to_the_end_of_its_context,
    a_full_batch_is_computed,
    it_refuses_what_is_beyond_it,
    a_cancel_at_any_point_disturbs_nobody,
    a_step_that_fails_loses_no_more_than_itself,
    made_again_it_computes_the_same,
    a_worker_says_what_it_says,
    a_worker_continues_what_another_computed,
    a_worker_continues_what_the_reference_computed,
    a_cancel_frees_every_block,
    sequences_end_where_they_are_told,
    a_worker_refuses_what_it_cannot_do,
    in_a_new_process_it_computes_the_same,
    a_worker_whose_step_hangs_ends,
)
