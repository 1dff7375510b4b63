"""What a worker keeps of requests whose gateway is gone: for whom, how long, and how much."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from backends.emulation.synthetic import SyntheticBackend
from backends.protocol import (
    Adopt,
    Adopted,
    Cancel,
    Disown,
    Drain,
    Failed,
    FirstToken,
    Flow,
    Granted,
    Part,
    Prefill,
    Refused,
    RequestSpec,
    Reserve,
    Sampling,
    SequenceSpec,
    Token,
    Tokens,
)
from tests.host.test_control import SHAPE, Peer, Site, site, spec
from tests.support.patience import PATIENCE_SECONDS

BLOCKS = SHAPE["pool_tokens"] // 16


def slow(**more: Any) -> SyntheticBackend:
    return SyntheticBackend(**{**SHAPE, "step_seconds": 0.002, **more})


def kept(prompt: list[int], *, epoch: int = 1, keep: float = 30.0, **more: Any) -> RequestSpec:
    return msgspec.structs.replace(spec(prompt, **more), claim="c", epoch=epoch, keep_seconds=keep)


@pytest.fixture
async def worker() -> AsyncIterator[Site]:
    async for it in site(slow(), orphan_run_seconds=60.0):
        yield it


async def greeted(it: Site) -> Peer:
    return await (await it.peer()).greet()


async def hear_tokens(peer: Peer, count: int, *, rows: list[Token] | None = None) -> list[Token]:
    """At least `count` rows, after those in `rows`."""
    rows = rows if rows is not None else []
    while len(rows) < count:
        rows += (await peer.hear(Tokens)).rows
    return rows


async def begin(peer: Peer, request: RequestSpec, tokens: int) -> list[Token]:
    """Have a request decoded in place until its gateway has that many tokens."""
    peer.send(Prefill(spec=request, decode_here=True))
    first: FirstToken = await peer.hear(FirstToken)
    rows = [Token(request.handle, it.index, 0, it.token, it.finish) for it in first.first]
    return await hear_tokens(peer, tokens, rows=rows)


async def adopt(peer: Peer, *, epoch: int, handle: int = 100) -> Adopted:
    peer.send(Adopt(handle=handle, claim="c", epoch=epoch))
    adopted: Adopted = await peer.hear(Adopted)
    return adopted


async def until(true: Any, *about: Any, seconds: float = PATIENCE_SECONDS) -> None:
    async with asyncio.timeout(seconds):
        while not await true(*about):
            await asyncio.sleep(0.005)


async def all_free(peer: Peer) -> bool:
    return await peer.free() == BLOCKS


async def idle(it: Site) -> bool:
    return it.host._requests.idle


async def orphaned(it: Site, claim: str) -> bool:
    return claim in {held.claim for held, _ in it.host._requests._book.orphans}


async def paused(it: Site) -> bool:
    running = it.host._requests.steps._running
    return bool(running) and all(one.paused for one in running)


async def granted(peer: Peer, request: RequestSpec) -> bool:
    peer.send(Reserve(spec=request))
    return isinstance(await peer.hear(Granted, Refused), Granted)


async def alone(request: RequestSpec) -> dict[int, list[int]]:
    """Its tokens when nobody disturbs it."""
    async for it in site(SyntheticBackend(**SHAPE)):
        peer = await greeted(it)
        total = len(request.sequences) * request.max_tokens
        return by_index(await begin(peer, request, total))
    raise AssertionError


def by_index(rows: list[Token]) -> dict[int, list[int]]:
    """Tokens of each sequence; any that comes twice must be the same."""
    lines: dict[int, dict[int, int]] = {}
    for row in rows:
        assert lines.setdefault(row.index, {}).setdefault(row.position, row.token) == row.token
    for line in lines.values():
        assert sorted(line) == list(range(len(line)))
    return {index: [line[at] for at in sorted(line)] for index, line in lines.items()}


@pytest.mark.parametrize("leaves", ["dies", "disowns", "stands still"])
async def test_another_gateway_goes_on_with_the_very_tokens(worker: Site, leaves: str) -> None:
    length = 120 if leaves == "stands still" else 60  # it must not be over when the other comes
    request = kept([1] * 40, n=3, max_tokens=length)
    first = await greeted(worker)
    heard = await begin(first, request, 30)
    if leaves == "dies":
        first.writer.close()
    elif leaves == "disowns":
        first.send(Disown(handle=1))
        await first.free()
    second = await greeted(worker)
    adopted = await adopt(second, epoch=2)
    assert adopted.parts == (Part(100, 1, "decoding", (0, 1, 2)),)
    rows = await hear_tokens(second, 3 * length)
    assert {row.handle for row in rows} == {100}
    assert sum(row.finish == "length" for row in rows) == 3
    assert by_index([*heard, *rows]) == await alone(request)
    if leaves == "stands still":
        fenced: Failed = await first.hear(Failed)
        assert (fenced.handle, fenced.code, fenced.retry) == (1, "fenced", False)
        first.send(Cancel(handle=1))  # too late: it has no right to it
        await first.free()
    second.send(Cancel(handle=100))
    await until(all_free, second)


async def test_what_has_ended_keeps_its_tokens_and_no_blocks(worker: Site) -> None:
    request = kept([1] * 40, n=2, max_tokens=20, sampling=Sampling(logprobs=2))
    first, second = await greeted(worker), await greeted(worker)
    await begin(first, request, 40)
    await until(all_free, second)
    first.writer.close()
    await adopt(second, epoch=2)
    rows = await hear_tokens(second, 40)
    assert all(row.logprob is not None and row.logprob.token == row.token for row in rows)
    assert [row.finish for row in rows if row.position == 19] == ["length", "length"]
    assert not any(row.finish for row in rows if row.position < 19)


async def test_a_lower_or_equal_epoch_gets_nothing_and_hears_the_higher_one(worker: Site) -> None:
    first, second, third = [await greeted(worker) for _ in range(3)]
    await begin(first, kept([1] * 40, max_tokens=2000, epoch=3), 5)
    for epoch in (2, 3):
        assert await adopt(second, epoch=epoch) == Adopted(handle=100, epoch=3)
    assert (await adopt(second, epoch=4)).parts
    assert await adopt(third, epoch=4) == Adopted(handle=100, epoch=4)
    first.writer.close()
    assert (await adopt(third, epoch=5)).parts
    assert (await second.hear(Failed)).code == "fenced"


async def test_a_former_owner_can_begin_nothing_more_under_its_claim(worker: Site) -> None:
    first, second = await greeted(worker), await greeted(worker)
    await begin(first, kept([1] * 40, max_tokens=2000), 5)
    await adopt(second, epoch=5)
    await first.hear(Failed)
    for message in (
        Reserve(spec=kept([1] * 40, handle=2, epoch=4)),
        Prefill(spec=kept([1] * 40, handle=2, epoch=4), decode_here=True),
    ):
        first.send(message)
        fenced: Failed = await first.hear(Failed)
        assert (fenced.handle, fenced.code) == (2, "fenced")


async def test_a_new_attempt_of_the_owner_ends_what_an_old_one_left(worker: Site) -> None:
    first = await greeted(worker)
    await begin(first, kept([1] * 40, max_tokens=2000), 5)
    first.writer.close()
    again = await greeted(worker)
    await begin(again, kept([1] * 40, max_tokens=4, epoch=2), 4)
    await until(all_free, again)
    assert [part.epoch for part in (await adopt(again, epoch=9)).parts] == [2]


async def test_nothing_is_kept_beyond_its_lease() -> None:
    async for it in site(slow()):
        first, second = await greeted(it), await greeted(it)
        await begin(first, kept([1] * 40, max_tokens=400, keep=0.3), 5)
        first.writer.close()
        await until(orphaned, it, "c")
        await until(idle, it)
        await until(all_free, second)
        assert (await adopt(second, epoch=2)).parts == ()


async def test_nothing_is_kept_beyond_its_deadline() -> None:
    async for it in site(slow()):
        first, second = await greeted(it), await greeted(it)
        await begin(first, kept([1] * 40, max_tokens=6, deadline_seconds=2.0), 6)
        await until(idle, it)
        assert (await adopt(second, epoch=2)).parts == ()


async def test_a_request_without_a_claim_ends_with_its_gateway() -> None:
    async for it in site(slow(step_seconds=0.2)):  # its pool lasts for longer than is waited
        first, second = await greeted(it), await greeted(it)
        await begin(first, spec([1] * 40, max_tokens=2000), 5)
        first.send(Prefill(spec=spec([1] * 40, handle=2, max_tokens=2000), decode_here=True))
        first.send(Disown(handle=2))
        first.writer.close()
        await until(all_free, second)
        assert it.host._requests.idle


async def test_what_nobody_owns_pauses_and_goes_on_when_adopted() -> None:
    async for it in site(slow(step_seconds=0.01), orphan_run_seconds=0.1):
        first, second = await greeted(it), await greeted(it)
        request = kept([1] * 40, max_tokens=200)
        await begin(first, request, 10)
        first.writer.close()
        await until(paused, it)
        await adopt(second, epoch=2)
        rows = await hear_tokens(second, 200)
        assert by_index(rows) == await alone(request)


async def test_new_work_takes_the_pool_from_what_nobody_owns() -> None:
    async for it in site(slow()):
        first, second = await greeted(it), await greeted(it)
        request = kept([1] * 200, max_tokens=250)
        heard = await begin(first, request, 5)
        first.writer.close()
        await until(orphaned, it, "c")
        await until(granted, second, spec([1] * 390, handle=7))
        await adopt(second, epoch=2)
        rows = await hear_tokens(second, len(heard))
        lost: Failed = await second.hear(Failed)
        assert (lost.handle, lost.indexes, lost.retry) == (100, (0,), True)
        assert by_index([*heard, *rows])[0] == (await alone(request))[0][: len(rows)]
        second.send(Cancel(handle=7))
        second.send(Cancel(handle=100))
        await until(all_free, second)


async def test_nobody_makes_way_for_blocks_that_are_there_already() -> None:
    """A prefix that another sequence holds, of which a landing needs the end alone."""
    async for it in site(slow(), orphan_run_seconds=0.0):
        first, second = await greeted(it), await greeted(it)
        shared = msgspec.structs.replace(spec([2] * 280, max_tokens=200), salt=b"t")
        await begin(second, shared, 1)
        second.send(Flow(handle=shared.handle, index=0, paused=True))
        await begin(first, kept([1] * 170, max_tokens=250, handle=2), 2)
        first.writer.close()
        await until(orphaned, it, "c")
        await until(proven, it)
        whole = it.host._info.layout.blocks_for(280)
        assert await second.free() < whole
        again = msgspec.structs.replace(shared, handle=7)
        second.send(Reserve(spec=again, partial=True))
        granted: Granted = await second.hear(Granted)
        assert granted.landing.present == 272
        (orphan,) = (held for held, _ in it.host._requests._book.orphans)
        assert orphan.running


async def proven(it: Site) -> bool:
    return all(one.proof for one in it.host._requests.reuse.prefixes._by_link.values())


async def test_too_many_that_nobody_owns_are_given_up_the_oldest_first() -> None:
    async for it in site(slow(), max_orphans=2):
        second = await greeted(it)
        for number in range(3):
            first = await greeted(it)
            request = msgspec.structs.replace(
                kept([1] * 40, max_tokens=2000), claim=f"claim {number}"
            )
            await begin(first, request, 3)
            first.writer.close()
            await until(orphaned, it, request.claim)
        for number, found in enumerate([False, True, True]):
            second.send(Adopt(handle=100 + number, claim=f"claim {number}", epoch=2))
            assert bool((await second.hear(Adopted)).parts) == found


async def test_sequences_that_were_stopped_keep_their_tokens(worker: Site) -> None:
    first, second = await greeted(worker), await greeted(worker)
    await begin(first, kept([1] * 40, n=2, max_tokens=2000), 10)
    first.send(Cancel(handle=1, indexes=(0,)))
    first.send(Cancel(handle=1, indexes=(0, 1)))
    await until(all_free, first)
    first.writer.close()
    (part,) = (await adopt(second, epoch=2)).parts
    assert part.indexes == (0, 1)
    rows = await hear_tokens(second, 10)
    assert not any(row.finish for row in rows)
    second.send(Cancel(handle=100))
    await second.free()
    assert worker.host._requests.idle


def test_two_requests_of_unlike_gateways_never_share_a_name_in_the_ledger() -> None:
    from backends.host.book import Book
    from backends.protocol import Link, ToWorker

    async def names() -> set[str]:
        book = Book()
        links = [Link(ToWorker, lambda *_: None, lambda *_: None) for _ in range(2)]
        return {book.open(link, spec([1])).name for link in links}

    assert len(asyncio.run(names())) == 2


def test_a_track_knows_the_logprobs_of_its_last_tokens_alone() -> None:
    from backends.host.work import Track
    from backends.protocol import Logprob

    track = Track([5, 6], [])
    track.add(7, None, Logprob(7, -1.0))
    track.add(8, "stop", Logprob(8, -2.0))
    assert track.rows(3, 1) == [
        Token(3, 1, 0, 5),
        Token(3, 1, 1, 6),
        Token(3, 1, 2, 7, None, Logprob(7, -1.0)),
        Token(3, 1, 3, 8, "stop", Logprob(8, -2.0)),
    ]


async def test_bound_tokens_of_a_prefill_are_there_for_whoever_adopts_it() -> None:
    async for it in site(slow(prefill_seconds_per_token=0.01)):
        first, second = await greeted(it), await greeted(it)
        sequence = SequenceSpec(index=2, seed=2, generated=[11, 12, 13])
        request = msgspec.structs.replace(kept([1] * 40, max_tokens=9), sequences=(sequence,))
        first.send(Prefill(spec=request, decode_here=True))
        await first.free()
        first.writer.close()
        assert (await adopt(second, epoch=2)).parts == (Part(102, 1, "prefilling", (2,)),)
        rows = await hear_tokens(second, 9)
        assert by_index(rows)[2][:3] == [11, 12, 13]
        assert rows[-1].finish == "length"


async def test_a_worker_that_drains_does_not_wait_for_ever_for_new_owners() -> None:
    async for it in site(slow(), drain_seconds=0.2, orphan_run_seconds=60.0):
        peer = await greeted(it)
        await begin(peer, kept([1, 2, 3], max_tokens=4000), 5)
        peer.writer.close()
        other = await greeted(it)
        other.send(Drain())
        assert await other.ended()


async def test_a_worker_that_drains_gives_back_what_would_be_kept() -> None:
    async for it in site(slow(), drain_seconds=0.2):
        peer = await greeted(it)
        await begin(peer, kept([1, 2, 3], max_tokens=4000), 5)
        peer.send(Drain())
        failed: Failed = await peer.hear(Failed)
        assert (failed.code, failed.indexes, failed.retry) == ("draining", (0,), True)
        assert await peer.ended()
