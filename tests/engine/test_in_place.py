"""What an engine prefills and decodes in one place."""

from typing import Any, cast

from backends.api import DecodeJob, Logprob, Output, PoolExhausted, Sampled
from tests.engine.played import PROMPT, given, played


async def test_when_one_sequence_in_place_is_refused_no_other_is_asked_for() -> None:
    async with played() as desk:
        desk.engine.refusal = PoolExhausted("x")
        desk.engine.refusals = 1
        desk.prefix(n=3, here=True)
        await desk.until(lambda: desk.told.losses)
        assert (len(desk.told.losses), desk.engine.jobs) == (1, {})


async def test_a_sequence_in_place_that_ends_before_the_others_begin_is_free_at_once() -> None:
    async with played() as desk:
        desk.told.then = lambda it: setattr(desk, "started", desk.here(it))
        work = desk.prefix(n=2, here=True)
        one, two = await given(desk, 2)
        desk.say.decoded([(one, Sampled(1)), (one, Sampled(2))])
        desk.say.ended(one)
        await desk.heard()
        desk.say.decoded([(two, Sampled(3))])
        await desk.until(lambda: desk.told.losses)
        first, _ = cast("Any", desk).started
        assert (desk.told.tokens, desk.told.freed) == ([2], [work, first])


async def test_in_place_a_prefix_is_done_when_every_sequence_has_a_token() -> None:
    async with played() as desk:
        work = desk.prefix(n=2, here=True, scores=0)
        desk.told.then = lambda it: setattr(desk, "started", desk.here(it))
        one, two = await given(desk, 2)
        scores = tuple(Logprob(1, -1.0) for _ in PROMPT[1:])
        desk.say.prefilled(one, Output((), scores), 8)
        desk.say.decoded([(one, Sampled(3))])
        desk.say.decoded([(one, Sampled(4))])
        await desk.heard()
        assert not desk.told.outputs
        desk.say.decoded([(one, Sampled(5)), (two, Sampled(9))])
        await desk.until(lambda: desk.told.tokens == [4, 5])
        assert desk.told.outputs == [Output((Sampled(3), Sampled(9)))]
        assert (work.reused, len(work.logprobs)) == (8, 39)
        assert desk.told.freed == [work]
        jobs = cast("list[DecodeJob]", list(desk.engine.jobs.values()))
        assert [job.prompt_logprobs for job in jobs] == [0, None]
        desk.say.decoded([(two, Sampled(8))])
        await desk.until(lambda: desk.told.tokens == [4, 5, 8])
        desk.say.ended(one)
        await desk.until(lambda: len(desk.told.losses) == 1)


async def test_what_is_cancelled_in_place_ends_every_sequence() -> None:
    async with played() as desk:
        work = desk.prefix(n=3, here=True)
        names = await given(desk, 3)
        desk.say.decoded([(names[0], Sampled(3))])
        await desk.heard()
        desk.told.end(work)
        await desk.until(lambda: sorted(desk.engine.aborted) == sorted(names))
        assert desk.told.freed == [work]
        for name in names:
            desk.say.ended(name)
        await desk.heard()
        assert (desk.loop._open, desk.loop._given) == ({}, {})
