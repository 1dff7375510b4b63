"""What a worker keeps for another gateway, when what it hosts is an engine."""

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from backends.protocol import (
    Cancel,
    Drain,
    Failed,
    FirstToken,
    Granted,
    Prefill,
    Refused,
    Reserve,
)
from tests.engine.desk import engine, true_line
from tests.host.test_control import SHAPE, Site, site, spec
from tests.host.test_keeping import (
    adopt,
    all_free,
    begin,
    by_index,
    greeted,
    hear_tokens,
    kept,
    test_a_former_owner_can_begin_nothing_more_under_its_claim,
    test_a_lower_or_equal_epoch_gets_nothing_and_hears_the_higher_one,
    test_a_new_attempt_of_the_owner_ends_what_an_old_one_left,
    test_a_request_without_a_claim_ends_with_its_gateway,
    test_another_gateway_goes_on_with_the_very_tokens,
    test_sequences_that_were_stopped_keep_their_tokens,
    test_what_has_ended_keeps_its_tokens_and_no_blocks,
    until,
)

__all__ = [
    "test_a_former_owner_can_begin_nothing_more_under_its_claim",
    "test_a_lower_or_equal_epoch_gets_nothing_and_hears_the_higher_one",
    "test_a_new_attempt_of_the_owner_ends_what_an_old_one_left",
    "test_a_request_without_a_claim_ends_with_its_gateway",
    "test_another_gateway_goes_on_with_the_very_tokens",
    "test_sequences_that_were_stopped_keep_their_tokens",
    "test_what_has_ended_keeps_its_tokens_and_no_blocks",
]


def slow(**more: Any) -> Any:
    """An engine with an arena of as many blocks as the pool that those tests count."""
    arena = SHAPE["pool_tokens"]
    options = {**SHAPE, "pool_tokens": 4096, "arena_tokens": arena, "step_seconds": 0.002}
    return engine(**{**options, **more})


@pytest.fixture
async def worker() -> AsyncIterator[Site]:
    async for it in site(slow(), orphan_run_seconds=60.0):
        yield it


async def parked(it: Site) -> bool:
    """The engine has nothing any more of what is still decoded here."""
    loop = it.host._requests.steps
    return loop.running == 1 and not loop.pins.held


async def paused(it: Site) -> bool:
    """Tokens wait for somebody who takes them."""
    loop: Any = it.host._requests.steps
    return any(one.tokens for one in loop._untold._jobs)


async def test_what_nobody_owns_is_computed_no_more_and_told_to_its_adopter() -> None:
    async for it in site(slow(), orphan_run_seconds=0.05):
        first, second = await greeted(it), await greeted(it)
        request = kept([1] * 40, max_tokens=2000)
        heard = await begin(first, request, 10)
        first.writer.close()
        await until(parked, it)
        await adopt(second, epoch=2)
        rows = await hear_tokens(second, len(heard) + 256)
        lost: Failed = await second.hear(Failed)
        assert (lost.handle, lost.indexes, lost.code) == (100, (0,), "preempted")
        (line,) = by_index([*heard, *rows]).values()
        assert line == true_line((1,) * 40, 0, 2000)[: len(line)]
        second.send(Cancel(handle=100))
        await until(all_free, second)


async def test_a_short_pause_costs_nothing() -> None:
    async for it in site(slow(step_seconds=0.01), orphan_run_seconds=0.05):
        first, second = await greeted(it), await greeted(it)
        request = kept([1] * 40, max_tokens=200)
        await begin(first, request, 10)
        first.writer.close()
        await until(paused, it)
        await adopt(second, epoch=2)
        (line,) = by_index(await hear_tokens(second, 200)).values()
        assert line == true_line((1,) * 40, 0, 200)


async def test_what_a_worker_gives_back_when_it_drains_may_go_on_elsewhere() -> None:
    async for it in site(slow(linger_seconds=0.05), drain_seconds=0.2):
        peer = await greeted(it)
        await begin(peer, kept([1, 2, 3], max_tokens=4000), 5)
        peer.send(Drain())
        failed: Failed = await peer.hear(Failed)
        assert (failed.code, failed.indexes, failed.retry) == ("draining", (0,), True)
        assert await peer.ended()


async def test_scores_of_a_prompt_are_refused_by_an_engine_that_gives_none() -> None:
    scored = msgspec.structs.replace(spec([1] * 40), prompt_logprobs=2)
    async for it in site(slow()):
        peer = await greeted(it)
        peer.send(Prefill(spec=scored, decode_here=True))
        refused: Refused = await peer.hear(Refused)
        assert (refused.kind, refused.detail.partition(":")[0]) == ("invalid", "prompt_logprobs")
        peer.send(Reserve(spec=scored))  # whoever only decodes need not give any
        await peer.hear(Granted)
    async for it in site(slow(prompt_logprobs=True)):
        peer = await greeted(it)
        peer.send(Prefill(spec=scored, decode_here=True))
        first: FirstToken = await peer.hear(FirstToken)
        assert [it.token for it in first.prompt_logprobs] == [1] * 39
