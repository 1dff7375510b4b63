"""Carrying many requests at once never holds the loop, neither the gateway's nor a worker's."""

import asyncio

from backends.emulation.synthetic import SyntheticBackend
from tests.life.cluster import DECODE, PREFILL, SHAPE, Heard, cluster
from tests.support.watch import slow_callbacks


def test_no_callback_holds_the_loop(redis_url: str):
    ended = []
    prefill = SyntheticBackend(**SHAPE, **PREFILL)
    decode = SyntheticBackend(**SHAPE, **DECODE)

    async def work() -> None:
        async with cluster(redis_url) as made:
            await made.start("p", "prefill", backend=prefill)
            await made.start("d", "decode", backend=decode)
            await made.paired()
            heard = [Heard() for _ in range(32)]
            prompts = (list(range(100 + 10 * i)) for i in range(32))
            jobs = (made.job(prompt, n=2, max_tokens=50) for prompt in prompts)
            await asyncio.gather(*(map(made.carry, jobs, heard)))
            ended.extend(one.finish for one in heard)
            await made.balanced()

    assert not slow_callbacks(work)
    assert ended == [{0: "length", 1: "length"}] * 32
