"""What a gateway hears on a channel, and when it has to ask what it has missed."""

import asyncio
from typing import Any, Self, cast

from redis.asyncio import Redis

from gateway.admission.client import listen
from tests.support.patience import LONG_SECONDS, PATIENCE_SECONDS

from .queueing import until


class Subscription:
    """One that says what a test gives it."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.says: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def pubsub(self) -> Self:
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exit_: object) -> None: ...

    async def subscribe(self, channel: str) -> None:
        self.asked.set()

    async def get_message(self, timeout: float) -> dict[str, Any]:
        return await self.says.get()


async def test_what_was_missed_is_asked_for_once_the_subscription_stands() -> None:
    """Not when it was asked for: what is published until then, nobody hears."""
    made, gaps, heard = Subscription(), list[int](), list[bytes]()
    listening = asyncio.ensure_future(
        listen(
            cast("Redis", made),
            "channel",
            heard=heard.append,
            gap=lambda: gaps.append(len(heard)),
            quiet_seconds=LONG_SECONDS,
        )
    )
    await asyncio.wait_for(made.asked.wait(), PATIENCE_SECONDS)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not gaps
    made.says.put_nowait({"type": "subscribe", "data": 1})
    made.says.put_nowait({"type": "message", "data": b"one"})
    await until(lambda: heard == [b"one"])
    assert gaps == [0]
    listening.cancel()
    await asyncio.wait([listening])


async def test_it_is_asked_again_after_each_loss_of_the_connection(redis: Redis) -> None:
    gaps, heard = list[int](), list[bytes]()
    listening = asyncio.ensure_future(
        listen(
            redis,
            "channel",
            heard=heard.append,
            gap=lambda: gaps.append(len(heard)),
            quiet_seconds=PATIENCE_SECONDS,
        )
    )
    for number in range(3):
        await until(lambda number=number: len(gaps) == number + 1)
        assert await redis.publish("channel", b"news") == 1
        await until(lambda number=number: len(heard) == number + 1)
        assert await redis.client_kill_filter(_type="pubsub") == 1
    assert gaps[:3] == [0, 1, 2]
    listening.cancel()
    await asyncio.wait([listening])
