"""Control connections over TCP with certificates: all show one, or are not let in."""

import asyncio
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import structlog

from backends.host import listening
from backends.protocol import Link, ToWorker
from tests.life.cluster import DECODE, PREFILL, Heard, cluster
from tests.support.certificates import authority
from tests.support.patience import PATIENCE_SECONDS

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
ANYWHERE = "tcp:127.0.0.1:0"


async def test_gateway_and_workers_speak_tls(redis_url: str, tmp_path: Path) -> None:
    ours = authority(tmp_path)
    async with cluster(redis_url, fleet={"tls": ours.client()}) as made:
        host = {"listen": ANYWHERE, "tls": ours}
        await made.start("p", "prefill", host=host, **PREFILL)
        await made.start("d", "decode", host=host, **DECODE)
        await made.paired()
        heard = Heard()
        await made.carry(made.job([1, 2, 3], max_tokens=5), heard)
        assert len(heard.tokens[0]) == 5
        await made.balanced()


async def test_a_connection_that_never_shakes_hands_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "TLS_SECONDS", 0.2)
    made: list[Link] = []

    def link() -> Link:
        made.append(Link(ToWorker, lambda *_: None, lambda *_: None))
        return made[-1]

    server, address = await listening.listen(ANYWHERE, link, authority(tmp_path).server())
    async with server, asyncio.timeout(PATIENCE_SECONDS):
        _, host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        assert await reader.read() == b""
        writer.close()


def test_a_link_that_ended_before_its_connection_was_made_keeps_none() -> None:
    link = Link(ToWorker, lambda *_: None, lambda *_: None)
    link.abort("it took too long")
    transport = Mock()
    link.connection_made(transport)
    transport.abort.assert_called_once_with()


async def test_without_a_certificate_neither_side_is_spoken_to(
    redis_url: str, tmp_path: Path
) -> None:
    ours, other = tmp_path / "ours", tmp_path / "other"
    ours.mkdir()
    other.mkdir()
    trusted, stranger = authority(ours), authority(other)
    for gateway, worker in ((None, trusted), (trusted, None), (stranger, trusted)):
        tls = gateway.client() if gateway is not None else None
        async with cluster(redis_url, fleet={"tls": tls}) as made:
            with structlog.testing.capture_logs() as logs:
                await made.start("b", "both", host={"listen": ANYWHERE, "tls": worker}, **DECODE)
                await made.until(lambda: "worker.unreachable" in {it["event"] for it in logs})
            assert made.fleet.workers == ()
            assert not made.hosts["b"]._links
