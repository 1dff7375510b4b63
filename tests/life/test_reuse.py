"""Prefixes that both ends of a handoff have seen before.

Whatever is decoded here comes from KV that the backend has looked at to the bit (`verify_kv`).
"""

import asyncio
import random
from typing import Any

import msgspec
import numpy as np
import pytest

from backends.chain import chain, mark, pack
from backends.host.reuse import Reuse
from backends.protocol import Cached
from gateway.errors import WorkerFailed
from gateway.life.cached import Known
from gateway.life.job import Timeline
from tests.life.cluster import DECODE, PREFILL, Cluster, Heard, cluster

PROMPT = list(range(100, 300))  # six blocks of 32 and a bit, or twelve of 16 and a bit
LAYOUTS = [(PREFILL, DECODE), (DECODE, PREFILL), (DECODE, DECODE)]


def reuse(made: Cluster, name: str) -> Reuse:
    return made.hosts[name]._requests.reuse


async def pair(made: Cluster, *, ours: Any = PREFILL, theirs: Any = DECODE, **more: Any) -> None:
    await made.start("p", "prefill", **ours, host=more.get("prefill"))
    await made.start("d", "decode", **theirs, host=more.get("decode"), **more.get("options", {}))
    await made.paired()


async def say(
    made: Cluster, prompt: list[int], **job: Any
) -> tuple[Timeline, dict[int, list[int]]]:
    heard = Heard()
    timeline = await made.carry(made.job(prompt, **job), heard)
    await made.balanced()
    for name in ("p", "d"):
        kept = reuse(made, name).prefixes._by_link
        await made.until(lambda kept=kept: all(it.proof is not None for it in kept.values()))
    return timeline, heard.tokens


async def expected(redis_url: str, *asked: tuple[list[int], dict[str, Any]]) -> list[Any]:
    """The same texts from one worker that keeps nothing."""
    async with cluster(redis_url) as made:
        await made.start("b", "both", host={"reuse": "off"})
        await made.until(lambda: made.fleet.workers)
        texts = []
        for prompt, job in asked:
            heard = Heard()
            await made.carry(made.job(prompt, **job), heard)
            texts.append(heard.tokens)
        return texts


@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize(("ours", "theirs"), LAYOUTS, ids=["32-16", "16-32", "16-16"])
async def test_only_the_rest_is_computed_and_only_the_rest_travels(
    redis_url: str, transport: str, ours: Any, theirs: Any
) -> None:
    longer = [*PROMPT, 1, 2, 3]
    branch = [*PROMPT[:150], *range(50)]
    asked = [(PROMPT, {"n": 2}), (PROMPT, {"n": 3}), (longer, {}), (branch, {"n": 2})]
    async with cluster(redis_url) as made:
        await pair(made, ours=ours, theirs=theirs, decode={"transports": (transport,)})
        told = [await say(made, prompt, **job) for prompt, job in asked]
        sizes = ours["block_tokens"], theirs["block_tokens"]
        for (timeline, _), common in zip(told, (0, 200, 200, 150), strict=True):
            assert timeline.cached_tokens == common // sizes[0] * sizes[0]
            assert timeline.present_tokens == common // sizes[1] * sizes[1]
            assert timeline.retries == 0
    assert [text for _, text in told] == await expected(redis_url, *asked)


async def test_a_chat_goes_on_where_it_was_decoded(redis_url: str) -> None:
    async with cluster(redis_url) as made:
        await pair(made)
        _, text = await say(made, PROMPT, max_tokens=50)
        turn = [*PROMPT, *text[0], 5, 6, 7]
        timeline, answer = await say(made, turn)
        assert timeline.cached_tokens == 192  # the prefill worker knows the prompt alone
        assert timeline.present_tokens == 240
    assert answer == (await expected(redis_url, (turn, {})))[0]


async def test_two_tenants_never_share(redis_url: str) -> None:
    async with cluster(redis_url) as made:
        await pair(made)
        for salt in (b"one", b"two", b"", b""):
            timeline, _ = await say(made, PROMPT, salt=salt)
            assert (timeline.cached_tokens, timeline.present_tokens) == (0, 0)
        timeline, _ = await say(made, PROMPT, salt=b"two")
        assert (timeline.cached_tokens, timeline.present_tokens) == (192, 192)


def flip(made: Cluster, name: str, place: int) -> None:
    """Flip a bit in the kept block of a prefix that has this place in it."""
    host = made.hosts[name]
    layout = host._info.layout
    kept = reuse(made, name).prefixes.find(chain(layout, b"tenant", PROMPT), 99)
    pool = np.frombuffer(reuse(made, name)._pool, np.uint8)
    one = pool.reshape(-1)[: layout.block_bytes * host._info.pool_blocks]
    block = kept[place].block
    if layout.axes.startswith("block"):
        one[block * layout.block_bytes + 77] ^= 0x08
    else:
        size = layout.block_bytes // (layout.layers * 2)
        one[block * size + 77] ^= 0x08


@pytest.mark.parametrize(("name", "retries"), [("p", 0), ("d", 1)])
async def test_damage_to_what_was_kept_costs_time_and_no_token(
    redis_url: str, name: str, retries: int
) -> None:
    async with cluster(redis_url) as made:
        await pair(made)
        texts = [await say(made, PROMPT)]
        flip(made, name, 3)
        texts += [await say(made, PROMPT), await say(made, PROMPT)]
    assert [timeline.retries for timeline, _ in texts] == [0, retries, 0]
    damaged, healed = texts[1][0], texts[2][0]
    if name == "p":
        assert damaged.cached_tokens == 3 * 32
    else:
        assert damaged.present_tokens == 3 * 16
    assert (healed.cached_tokens, healed.present_tokens) == (192, 192)
    assert [text for _, text in texts] == 3 * await expected(redis_url, (PROMPT, {}))


@pytest.mark.parametrize("fault", ["flip_bit@*", "missing_page@*", "swapped_layer@*"])
async def test_nothing_of_a_landing_that_failed_is_kept(redis_url: str, fault: str) -> None:
    async with cluster(redis_url, max_retries=0) as made:
        await pair(made, prefill={"faults": fault})
        for _ in range(2):
            with pytest.raises(WorkerFailed, match="handoff"):
                await made.carry(made.job(PROMPT), Heard())
        assert not len(reuse(made, "d").prefixes)
        assert len(reuse(made, "p").prefixes) == 6
        await made.balanced()


async def test_damage_on_the_way_into_a_landing_with_a_part_is_seen(redis_url: str) -> None:
    longer = [*PROMPT, *range(40)]
    async with cluster(redis_url) as made:
        await pair(made, prefill={"faults": "flip_bit@2"})
        await say(made, PROMPT)
        timeline, text = await say(made, longer)
        assert (timeline.retries, timeline.present_tokens) == (1, 192)
    assert text == (await expected(redis_url, (longer, {})))[0]


async def test_a_pool_under_pressure_evicts_preempts_and_says_nothing_wrong(redis_url: str) -> None:
    """A pool of 40 blocks, twelve conversations of two turns that share beginnings."""
    dice = random.Random(5)
    asked = [
        ([*PROMPT[: 16 * dice.randint(1, 9)], *range(dice.randint(1, 40))], {"max_tokens": 40})
        for _ in range(24)
    ]
    async with cluster(redis_url, max_retries=50) as made:
        await pair(made, options={"pool_tokens": 640, "step_seconds": 0.001})
        heard = [Heard() for _ in asked]
        async with asyncio.TaskGroup() as tasks:
            for (prompt, job), one in zip(asked, heard, strict=True):
                tasks.create_task(made.carry(made.job(prompt, **job), one))
        await made.balanced()
        again = [await say(made, prompt, **job) for prompt, job in asked]
        assert sum(timeline.present_tokens for timeline, _ in again) > 0
    texts = await expected(redis_url, *asked)
    assert [one.tokens for one in heard] == texts
    assert [text for _, text in again] == texts


async def test_a_client_may_leave_at_any_moment(redis_url: str) -> None:
    dice = random.Random(7)
    async with cluster(redis_url) as made:
        await pair(made, options={"step_seconds": 0.001})
        _, text = await say(made, PROMPT, max_tokens=30)
        for _ in range(60):
            prompt = [*PROMPT[: dice.randint(20, 200)], *range(dice.randint(1, 60))]
            job = made.job(prompt, n=dice.randint(1, 3), max_tokens=30)
            carrying = asyncio.ensure_future(made.carry(job, Heard()))
            await asyncio.sleep(dice.random() * 0.03)
            carrying.cancel()
            await asyncio.wait([carrying])
        await made.balanced()
        timeline, again = await say(made, PROMPT, max_tokens=30)
        assert (timeline.cached_tokens, timeline.present_tokens) == (192, 192)
        assert again == text


async def test_a_gateway_knows_what_its_workers_keep(redis_url: str) -> None:
    async with cluster(redis_url) as made:
        await pair(made)
        await say(made, PROMPT, max_tokens=1)
        await say(made, PROMPT)
        for name, size in (("p", 32), ("d", 16)):
            layout = made.hosts[name]._info.layout
            marks = {mark(link) for link in chain(layout, b"tenant", PROMPT)}
            assert len(marks) == 200 // size
            worker = made.fleet.worker(name)
            assert worker is not None
            await made.until(lambda worker=worker, marks=marks: worker.cached.marks >= marks)
        await made.kill("d")
        await made.start("d", "decode", **DECODE)
        await made.paired()
        worker = made.fleet.worker("d")
        assert worker is not None
        assert not worker.cached.marks


async def test_a_worker_of_the_version_before_is_sent_and_sends_all(redis_url: str) -> None:
    for name in ("prefill", "decode"):
        async with cluster(redis_url) as made:
            await pair(made, **{name: {"protocol": 2}})
            await say(made, PROMPT)
            timeline, _ = await say(made, PROMPT)
            assert timeline.present_tokens == (0 if name == "prefill" else 192)
            worker = made.fleet.worker(name[0])
            assert worker is not None
            assert not worker.cached.marks


def test_after_a_gap_nothing_is_known_until_all_is_told_anew() -> None:
    known = Known("w", most=3)
    known.hear(Cached(number=5, added=pack([1, 2]), fresh=True))
    known.hear(Cached(number=6, added=pack([3]), removed=pack([1])))
    assert known.marks == {2, 3}
    known.hear(Cached(number=8, added=pack([4])))
    known.hear(Cached(number=9, added=pack([5])))
    assert known.marks == set()
    known.hear(Cached(number=0, added=pack([7]), fresh=True))
    assert known.marks == {7}
    known.hear(Cached(number=1, added=pack([8, 9, 10])))
    assert known.marks == set()


def test_what_is_told_is_bounded() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(
            msgspec.msgpack.encode(Cached(number=0, added=b"x" * (8 * 8193))), type=Cached
        )
    known = Known("w", most=9)
    known.hear(Cached(number=0, added=pack([1]) + b"half", fresh=True))
    assert known.marks == {1}
