"""A ticket with a name of its own, asked for twice: by the same gateway, or by another one."""

import asyncio

import pytest
from redis.asyncio import Redis

from gateway.admission import Terms
from gateway.errors import TakenOver
from tests.support.patience import PATIENCE_SECONDS

from .queueing import (
    Turn,
    book,
    gateway,
    heard,
    in_line,
    ticket,
    two_gateways,
    until,
    waiting,
    workers,
)


async def test_another_gateway_takes_a_waiting_ticket_over_at_its_place(redis: Redis) -> None:
    async with two_gateways(redis, decode=10) as (one, two), asyncio.TaskGroup() as tasks:
        first = Turn(tasks, two, ticket("first"))
        await first.inside.wait()
        old = Turn(tasks, one, ticket("old", name="mine", seconds=60))
        await in_line(redis, 1, one)
        late = Turn(tasks, two, ticket("late", seconds=61))
        await in_line(redis, 2, two)
        new = Turn(tasks, two, ticket("new", name="mine", seconds=65))
        await until(lambda: two.waiting == 2)
        for gate in (two, one):
            await heard(gate)
        await until(lambda: isinstance(old.error, TakenOver))
        assert await waiting(redis) == 2
        first.leave.set()
        await asyncio.wait_for(new.inside.wait(), PATIENCE_SECONDS)
        await heard(two)
        assert not late.inside.is_set()
        new.leave.set()
        await asyncio.wait_for(late.inside.wait(), PATIENCE_SECONDS)
        late.leave.set()


async def test_a_lease_that_is_taken_over_is_not_given_back_by_its_former_holder(
    redis: Redis,
) -> None:
    terms = Terms(concurrent=3)
    async with two_gateways(redis, decode=10) as (one, two), asyncio.TaskGroup() as tasks:
        old = Turn(tasks, one, ticket("old", name="mine", terms=terms))
        await old.inside.wait()
        new = Turn(tasks, two, ticket("new", name="mine", terms=terms))
        await asyncio.wait_for(new.inside.wait(), PATIENCE_SECONDS)
        old.grant.prefilled()
        old.leave.set()
        await old.task
        await one.flush(PATIENCE_SECONDS)
        assert await book(redis) == {"held_prefill": 10, "held_decode": 10}
        new.leave.set()
        await new.task
        await two.flush(PATIENCE_SECONDS)
        assert await book(redis) == {"held_prefill": 0, "held_decode": 0}
        assert await redis.exists("baton:{test}:active:t") == 0


async def test_who_was_taken_over_and_finds_no_room_does_not_wait_for_any(redis: Redis) -> None:
    """Its worker refuses it late, when nobody would grant it anything any more."""
    async with two_gateways(redis, decode=10) as (one, two), asyncio.TaskGroup() as tasks:
        old = Turn(tasks, one, ticket("old", name="mine"))
        await old.inside.wait()
        new = Turn(tasks, two, ticket("new", name="mine"))
        await asyncio.wait_for(new.inside.wait(), PATIENCE_SECONDS)
        await heard(one)
        with pytest.raises(TakenOver):
            await asyncio.wait_for(old.grant.again("decode", "decode"), PATIENCE_SECONDS)
        assert new.error is None
        for turn in (old, new):
            turn.leave.set()


async def test_a_former_owner_that_enqueues_late_takes_nothing_over(redis: Redis) -> None:
    async with two_gateways(redis, decode=10) as (one, two), asyncio.TaskGroup() as tasks:
        holder = Turn(tasks, two, ticket("holder", name="mine", owner_epoch=2))
        await holder.inside.wait()
        waiter = Turn(tasks, two, ticket("waiter", name="other", owner_epoch=2))
        await in_line(redis, 1, two)
        for name in ("mine", "other"):
            late = Turn(tasks, one, ticket("late", name=name, owner_epoch=1))
            await until(lambda late=late: isinstance(late.error, TakenOver))
        await one.flush(PATIENCE_SECONDS)
        assert await book(redis) == {"held_prefill": 10, "held_decode": 10}
        holder.leave.set()
        await asyncio.wait_for(waiter.inside.wait(), PATIENCE_SECONDS)
        assert waiter.error is None
        waiter.leave.set()


async def test_of_two_that_claim_a_right_after_an_outage_the_later_one_has_it(
    redis: Redis,
) -> None:
    """Redis has forgotten the ticket; the former holder speaks first, the new one has it."""
    async with two_gateways(redis, decode=10) as (one, two), asyncio.TaskGroup() as tasks:
        old = Turn(tasks, one, ticket("old", name="mine"))
        await old.inside.wait()
        new = Turn(tasks, two, ticket("new", name="mine"))
        await asyncio.wait_for(new.inside.wait(), PATIENCE_SECONDS)
        for kind in ("tickets", "leases", "room"):
            await redis.delete(f"baton:{{test}}:{kind}:tiny")
        for gate in (one, two, one, two):
            await gate._renew()
        assert await book(redis) == {"held_prefill": 10, "held_decode": 10}
        assert (one.held, two.held) == (0, 1)
        old.leave.set()
        await old.task
        await one.flush(PATIENCE_SECONDS)
        assert (await book(redis))["held_decode"] == 10
        new.leave.set()


async def test_a_former_owner_claims_nothing_that_waits_for_the_new_one(redis: Redis) -> None:
    """Redis has forgotten the lease; the new owner is in line again before the old one speaks."""
    async with two_gateways(redis, decode=20) as (one, two), asyncio.TaskGroup() as tasks:
        old = Turn(tasks, one, ticket("old", name="mine", owner_epoch=1))
        await old.inside.wait()
        other = Turn(tasks, two, ticket("other"))
        await other.inside.wait()
        assert await redis.hdel("baton:{test}:tickets:tiny", "mine")
        assert await redis.zrem("baton:{test}:leases:tiny", "mine")
        new = Turn(tasks, two, ticket("new", name="mine", owner_epoch=2))
        await in_line(redis, 1)
        for gate in (one, two):
            await gate._renew()
        assert (one.held, two.waiting, new.error) == (0, 1, None)
        old.leave.set()
        other.leave.set()
        await asyncio.wait_for(new.inside.wait(), PATIENCE_SECONDS)
        new.leave.set()


async def test_the_later_owner_has_a_right_that_the_former_was_given_again(redis: Redis) -> None:
    """Redis has forgotten that it was taken over, and grants it anew to the one before."""
    async with two_gateways(redis, decode=20) as (one, two), asyncio.TaskGroup() as tasks:
        new = Turn(tasks, two, ticket("new", name="mine", owner_epoch=2))
        await new.inside.wait()
        assert await redis.hdel("baton:{test}:tickets:tiny", "mine")
        assert await redis.zrem("baton:{test}:leases:tiny", "mine")
        old = Turn(tasks, one, ticket("old", name="mine", owner_epoch=1))
        await asyncio.wait_for(old.inside.wait(), PATIENCE_SECONDS)
        for gate in (two, one):
            await gate._renew()
        assert (one.held, two.held, new.error) == (0, 1, None)
        old.leave.set()
        new.leave.set()


async def test_leaving_late_does_not_cancel_the_one_who_came_again(redis: Redis) -> None:
    """The same gateway, the same name: the first one's going is still on its way."""
    async with (
        workers(redis, decode=10),
        gateway(redis, "g1") as one,
        asyncio.TaskGroup() as tasks,
    ):
        for _ in range(3):
            async with one.turn(ticket(name="mine")):
                pass
            again = Turn(tasks, one, ticket(name="mine"))
            await asyncio.wait_for(again.inside.wait(), PATIENCE_SECONDS)
            await one.flush(PATIENCE_SECONDS)
            assert (await book(redis))["held_decode"] == 10
            again.leave.set()
            await again.task


async def test_the_same_gateway_may_be_asked_again_while_the_first_waits(redis: Redis) -> None:
    async with (
        workers(redis, decode=10),
        gateway(redis, "g1") as one,
        asyncio.TaskGroup() as tasks,
    ):
        first = Turn(tasks, one, ticket("first"))
        await first.inside.wait()
        old = Turn(tasks, one, ticket("old", name="mine"))
        await until(lambda: one.waiting == 1)
        new = Turn(tasks, one, ticket("new", name="mine"))
        await until(lambda: isinstance(old.error, TakenOver))
        first.leave.set()
        await asyncio.wait_for(new.inside.wait(), PATIENCE_SECONDS)
        new.leave.set()
