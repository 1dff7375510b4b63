import pytest

from transfer.stage import TARGET
from transfer.tcp import TcpReceiver, TcpSender
from transfer.warming import warm_up


@pytest.fixture(autouse=True, scope="session")
def kernels_are_warm():
    warm_up()


@pytest.fixture
async def receiver():
    async with TcpReceiver(TARGET, stall_seconds=5.0) as receiver:
        yield receiver


@pytest.fixture
async def sender():
    async with TcpSender(stall_seconds=5.0) as sender:
        yield sender
