"""What the gateway does with a request that cannot be placed, or not in time."""

import asyncio

import pytest

from gateway.errors import DeadlineExceeded
from tests.life.cluster import DECODE, PREFILL, Cluster, Heard, cluster

LINE = list(range(600))


def queued(made: Cluster) -> int:
    return sum(worker.queued_tokens for worker in made.fleet.snapshot().workers)


async def test_a_first_token_that_would_be_late_is_refused_before_it_is_computed(
    redis_url: str,
) -> None:
    """Others are being computed, for long; that is known from those before them."""
    async with cluster(redis_url) as made:
        slow = {**PREFILL, "prefill_seconds_per_token": 1e-3}
        await made.start("p", "prefill", **slow)
        await made.start("d", "decode", **DECODE)
        await made.paired()
        for _ in range(3):
            await made.carry(made.job(LINE, max_tokens=2, salt=b""), Heard())
        async with asyncio.TaskGroup() as tasks:
            others = [
                tasks.create_task(made.carry(made.job(LINE, max_tokens=2, salt=b""), Heard()))
                for _ in range(3)
            ]
            await made.until(
                lambda: sum(it.queued_tokens for it in made.fleet.snapshot().workers) >= 1200
            )
            hurried = made.job(
                LINE, max_tokens=2, salt=b"", first_token_by=asyncio.get_running_loop().time() + 1.2
            )
            with pytest.raises(DeadlineExceeded, match="first token would take"):
                await made.carry(hurried, Heard())
            assert not others[-1].done()
        shown = made.relay.history.find(hurried.id)
        assert shown is not None
        assert shown["state"] == "failed"
        assert shown["placements"] == []
        await made.balanced()
