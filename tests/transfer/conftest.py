import pytest

from tests.support.patience import PATIENCE_SECONDS
from transfer.stage import TARGET
from transfer.tcp import TcpReceiver, TcpSender
from transfer.warming import warm_up


@pytest.fixture(autouse=True, scope="session")
def kernels_are_warm():
    warm_up()


@pytest.fixture
async def receiver():
    async with TcpReceiver(TARGET, stall_seconds=PATIENCE_SECONDS) as receiver:
        yield receiver


@pytest.fixture
async def sender():
    async with TcpSender(stall_seconds=PATIENCE_SECONDS) as sender:
        yield sender
