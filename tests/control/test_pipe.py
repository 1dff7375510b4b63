"""The connection over which scripts are asked."""

import asyncio
from typing import Any, Self, cast

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from gateway.admission.pipe import Pipe
from tests.support.patience import LONG_SECONDS, PATIENCE_SECONDS

INFO = b"redis_version:7.2.0\r\nredis_mode:standalone\r\nrun_id:one\r\n"


class Fragile:
    """A connection that answers the greeting, and breaks when a test says so."""

    def __init__(self) -> None:
        self.connection_pool = self
        self.connects = 0
        self.answer: asyncio.Future[bytes]

    def make_connection(self) -> Self:
        return self

    async def connect(self) -> None:
        self.connects += 1
        self.answer = asyncio.get_running_loop().create_future()

    async def disconnect(self, *, nowait: bool) -> None: ...

    async def send_packed_command(self, data: bytes, *, check_health: bool) -> None:
        if data:
            self.answer.set_result(INFO)

    async def read_response(self) -> Any:
        answer = await self.answer
        self.answer = asyncio.get_running_loop().create_future()
        return answer


@pytest.mark.parametrize("breaks", [False, True])
async def test_it_ends_when_it_is_cancelled_even_as_its_connection_breaks(breaks: bool) -> None:
    made = Fragile()
    pipe = Pipe(cast("Redis", made), use="test", scripts=(), timeout_seconds=LONG_SECONDS)
    running = asyncio.ensure_future(pipe.run())
    await asyncio.wait_for(pipe.until_ready(), PATIENCE_SECONDS)
    if breaks:
        made.answer.set_exception(RedisConnectionError("it broke"))
    running.cancel()
    await asyncio.wait([running], timeout=1.0)  # much longer than until it would connect again
    assert made.connects == 1
    assert running.cancelled()
