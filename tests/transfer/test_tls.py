"""Sessions and data connections over TLS, mutual, with certificates made on the spot."""

import contextlib
import shutil

import pytest

from tests.support.certificates import authority
from tests.support.patience import PATIENCE_SECONDS
from transfer.errors import PeerLost
from transfer.stage import SOURCE, TARGET, Gate, Pair
from transfer.tcp import TcpReceiver, TcpSender
from transfer.testing import PROMISES
from transfer.tls import Credentials

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return authority(tmp_path_factory.mktemp("theirs"))


@pytest.mark.parametrize("promise", PROMISES, ids=lambda it: it.__name__)
async def test_tcp_keeps_every_promise_over_tls(promise, ours):
    @contextlib.asynccontextmanager
    async def encrypted(layout):
        async with (
            TcpReceiver(layout, secret="s", tls=ours.server()) as receiver,
            TcpSender(secret="s", tls=ours.client()) as sender,
        ):
            gate = sender.tamper = Gate()
            yield Pair(sender, receiver, gate.closed)

    await promise(encrypted)


async def refused(server, client):
    async with (
        TcpReceiver(TARGET, tls=server, stall_seconds=PATIENCE_SECONDS) as receiver,
        TcpSender(tls=client, connect_seconds=PATIENCE_SECONDS) as sender,
    ):
        with pytest.raises(PeerLost):
            await sender.connect(receiver.endpoint, SOURCE, TARGET)


async def test_a_sender_without_tls_is_refused(ours):
    await refused(ours.server(), None)


async def test_a_receiver_without_tls_is_not_trusted(ours):
    await refused(None, ours.client())


async def test_certificates_of_another_authority_are_refused_on_either_side(ours, theirs):
    mixed = Credentials(theirs.certificate, theirs.key, ours.authority)
    await refused(ours.server(), theirs.client())
    await refused(mixed.server(), ours.client())
    await refused(ours.server(), mixed.client())


async def test_an_unpaired_key_is_named_at_once(ours, theirs):
    with pytest.raises(OSError, match="KEY_VALUES_MISMATCH"):
        Credentials(ours.certificate, theirs.key, ours.authority).server()


async def test_large_handoffs_arrive_over_tls(ours):
    pair_of = TcpReceiver(TARGET, tls=ours.server()), TcpSender(tls=ours.client())
    async with pair_of[0] as receiver, pair_of[1] as sender:
        await sender.connect(receiver.endpoint, SOURCE, TARGET)
        probe = await sender.probe(receiver.endpoint)
        assert probe.bytes_per_second > 0
