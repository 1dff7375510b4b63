"""The promises of an engine, a file for each kind of them.

`ENGINE` is the list, from what a plug-in says to what becomes of it when it is closed: whoever
writes one goes through it from the top.
"""

from __future__ import annotations

from backends.api import BackendInfo
from backends.testing.engine.bench import EngineBench
from backends.testing.engine.choosing import (
    CHOOSING,
    logprobs_agree_with_the_reference,
    prompt_logprobs_agree_with_the_reference,
    prompt_logprobs_are_given_as_declared,
)
from backends.testing.engine.ending import (
    an_abort_of_what_is_over_has_no_effect,
    an_aborted_job_ends_once_and_holds_nothing,
    it_can_be_closed_with_jobs_open,
    memory_comes_back,
    nothing_is_said_after_the_end,
)
from backends.testing.engine.exporting import (
    a_prefix_is_exported_whole,
    nothing_else_of_the_arena_is_touched,
    the_arena_is_left_alone_after_the_prefix,
    what_is_ready_is_final,
    without_blocks_nothing_is_exported,
)
from backends.testing.engine.importing import (
    a_continued_sequence_is_continued,
    decoding_after_a_handoff_equals_decoding_in_place,
    sequences_share_a_prefix,
    the_arena_is_free_once_imported,
    the_reference_continues_what_it_exports,
    what_the_reference_exports_is_continued,
)
from backends.testing.engine.stating import (
    calls_return_at_once,
    its_statements_make_sense,
)
from backends.testing.engine.telling import (
    a_seed_gives_its_text_again,
    every_token_is_told,
    it_ends_only_where_it_may,
    jobs_do_not_change_each_other,
    more_than_fits_waits_or_is_refused,
    nothing_is_found_under_another_salt,
)
from backends.testing.form import Promise

__all__ = ["ENGINE", "engine_core"]


def engine_core(info: BackendInfo) -> tuple[str, ...]:
    """That KV means what is stated, and that an abort leaves nothing behind: for its phases."""
    core = {
        "the_reference_continues_what_it_exports": {"prefill"},
        "what_the_reference_exports_is_continued": {"decode"},
        "decoding_after_a_handoff_equals_decoding_in_place": {"prefill", "decode"},
        "an_aborted_job_ends_once_and_holds_nothing": set(),
    }
    return tuple(name for name, phases in core.items() if phases <= info.phases)


ENGINE: tuple[Promise[EngineBench], ...] = (
    its_statements_make_sense,
    a_prefix_is_exported_whole,
    without_blocks_nothing_is_exported,
    what_is_ready_is_final,
    nothing_else_of_the_arena_is_touched,
    the_arena_is_left_alone_after_the_prefix,
    every_token_is_told,
    it_ends_only_where_it_may,
    decoding_after_a_handoff_equals_decoding_in_place,
    a_continued_sequence_is_continued,
    sequences_share_a_prefix,
    the_arena_is_free_once_imported,
    the_reference_continues_what_it_exports,
    what_the_reference_exports_is_continued,
    jobs_do_not_change_each_other,
    *CHOOSING,
    logprobs_agree_with_the_reference,
    a_seed_gives_its_text_again,
    prompt_logprobs_are_given_as_declared,
    prompt_logprobs_agree_with_the_reference,
    nothing_is_found_under_another_salt,
    an_aborted_job_ends_once_and_holds_nothing,
    an_abort_of_what_is_over_has_no_effect,
    nothing_is_said_after_the_end,
    more_than_fits_waits_or_is_refused,
    memory_comes_back,
    calls_return_at_once,
    it_can_be_closed_with_jobs_open,
)
