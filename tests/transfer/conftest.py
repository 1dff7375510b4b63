import pytest

from transfer.stage import TARGET
from transfer.tcp import TcpReceiver, TcpSender


@pytest.fixture
async def receiver():
    async with TcpReceiver(TARGET, stall_seconds=5.0) as receiver:
        yield receiver


@pytest.fixture
async def sender():
    async with TcpSender(stall_seconds=5.0) as sender:
        yield sender
