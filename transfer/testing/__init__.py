"""The promises of a transport, each as a function that checks it. Needs no test framework.

    pair = contextlib.asynccontextmanager(...)  # layout -> Pair(sender, receiver)
    await check_transport(pair)

Every promise gets a fresh pair whose receiver has the layout that it is called with. A broken
promise raises `BrokenPromise`, which says what was found; `PROMISES` lists them all.
There is a file for each kind of them; their furniture is in `transfer/stage.py`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from transfer.stage import BrokenPromise, MakePair, Pair
from transfer.testing.arriving import (
    a_handoff_arrives_bit_for_bit,
    a_write_renews_the_lease,
    an_owner_may_decline,
    many_handoffs_share_a_pair,
)
from transfer.testing.damage import (
    a_damaged_note_is_refused,
    a_slice_that_was_never_written_is_caught,
    digest_catches_a_flipped_bit,
    digest_catches_a_stale_page,
    digest_catches_k_in_place_of_v,
    digest_catches_swapped_layers,
    digest_catches_swapped_tokens,
)
from transfer.testing.endings import (
    a_lost_sender_fails_its_landings,
    abort_frees_the_landing,
    no_write_lands_after_quiesce,
    no_write_of_a_stalled_sender_lands_after_quiesce,
    quiesce_ends_when_the_sender_is_gone,
    the_loss_of_a_peer_is_told_once,
    withdrawn_landing_is_refused,
)
from transfer.testing.reuse import (
    a_writer_that_sends_all_is_refused,
    damage_to_what_is_present_is_caught,
    what_is_present_is_not_sent,
    what_is_present_renews_the_lease,
)
from transfer.testing.rights import (
    a_claim_is_told_before_the_first_write,
    an_id_may_be_expected_again,
    landing_has_one_writer,
    landing_is_used_once,
    unknown_landing_is_refused,
    write_outside_the_landing_is_refused,
    wrong_epoch_is_refused,
    wrong_secret_is_refused,
)

__all__ = ["PROMISES", "BrokenPromise", "MakePair", "Pair", "check_transport"]

PROMISES: tuple[Callable[[MakePair], Awaitable[None]], ...] = (
    a_handoff_arrives_bit_for_bit,
    a_write_renews_the_lease,
    many_handoffs_share_a_pair,
    landing_is_used_once,
    a_claim_is_told_before_the_first_write,
    landing_has_one_writer,
    wrong_epoch_is_refused,
    wrong_secret_is_refused,
    unknown_landing_is_refused,
    write_outside_the_landing_is_refused,
    digest_catches_a_flipped_bit,
    digest_catches_a_stale_page,
    digest_catches_swapped_layers,
    digest_catches_k_in_place_of_v,
    digest_catches_swapped_tokens,
    a_damaged_note_is_refused,
    a_slice_that_was_never_written_is_caught,
    abort_frees_the_landing,
    a_lost_sender_fails_its_landings,
    withdrawn_landing_is_refused,
    no_write_lands_after_quiesce,
    no_write_of_a_stalled_sender_lands_after_quiesce,
    quiesce_ends_when_the_sender_is_gone,
    an_id_may_be_expected_again,
    an_owner_may_decline,
    the_loss_of_a_peer_is_told_once,
    what_is_present_is_not_sent,
    what_is_present_renews_the_lease,
    damage_to_what_is_present_is_caught,
    a_writer_that_sends_all_is_refused,
)


async def check_transport(make_pair: MakePair) -> list[str]:
    """Check every promise in turn. Returns the names of those that hold, which is all of them.

    Raises:
        BrokenPromise: the first that does not hold, with its name.
    """
    kept = []
    for promise in PROMISES:
        name = getattr(promise, "__name__", repr(promise))
        try:
            await promise(make_pair)
        except BrokenPromise as error:
            raise BrokenPromise(f"{name}: {error}") from error
        kept.append(name)
    return kept
