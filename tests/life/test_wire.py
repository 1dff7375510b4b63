"""Pairs that are set to lossy codes: chosen where they are faster, decoded, and cleaned up."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from backends.api import BackendInfo
from backends.emulation.synthetic import SyntheticBackend
from backends.host import staging
from backends.host.ledger import Holder
from backends.host.peers import Peers
from gateway.server import workers
from tests.life.cluster import DECODE, PREFILL, Cluster, Heard, cluster
from tests.support.patience import PATIENCE_SECONDS
from transfer.contract import Probe, Sender
from transfer.layout import Endpoint

PROMPT = [(7 * it) % 1000 for it in range(150)]
WIRE = {"transports": ("tcp",), "wire": ("int8",)}
SLOW_BYTES, FAST_BYTES = 1e6, 1e13


class Inexact(SyntheticBackend):
    """Synthetic tokens that may differ in the last bits, for all that it says."""

    info: BackendInfo

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"layers": 3, "kv_heads": 2, "head_dim": 16, **options})
        self.info = msgspec.structs.replace(self.info, continuation="equivalent")


class SlowLink(Peers):
    """Senders that measure such a link, whatever there is."""

    rate = SLOW_BYTES

    def _sender(self, name: str) -> Sender:
        sender = super()._sender(name)

        async def probe(_endpoint: Endpoint) -> Probe:
            return Probe(self.rate, 1e-3)

        sender.probe = probe  # type: ignore[method-assign]
        return sender


class FastLink(SlowLink):
    """As fast as memory never is."""

    rate = FAST_BYTES


@pytest.fixture
async def made(redis_url: str) -> AsyncIterator[Cluster]:
    async with cluster(redis_url) as made:
        yield made


async def pair(
    made: Cluster, *, peers: Any = SlowLink, backend: Any = Inexact, **host: Any
) -> dict[str, Any]:
    settings = {**WIRE, **host}
    for name, role, options in (("p", "prefill", PREFILL), ("d", "decode", DECODE)):
        await made.start(name, role, backend=backend(**options), host=settings, peers=peers)
    await made.paired()
    (shown,) = workers(made.fleet)["pairs"]
    return shown


async def staged(made: Cluster) -> None:
    """Nothing is left in the pool for codes."""
    (pool,) = made.hosts["d"]._peers.stagings.values()
    await made.until(lambda: pool.ledger.free == pool.ledger.blocks)
    await made.balanced()


async def test_a_slow_link_carries_codes_and_says_so(made: Cluster) -> None:
    shown = await pair(made)
    assert shown["transport"] == "tcp+int8"
    assert "LOSSY int8 codes" in shown["plan"]
    assert shown["reason"].startswith("tcp+int8 ")
    assert "decodes" in shown["reason"]
    heard = Heard()
    timeline = await made.carry(made.job(PROMPT, n=2), heard)
    assert {index: len(tokens) for index, tokens in heard.tokens.items()} == {0: 20, 1: 20}
    assert timeline.retries == 0
    await staged(made)


async def test_a_fast_link_carries_numbers_and_says_why(made: Cluster) -> None:
    shown = await pair(made, peers=FastLink)
    assert shown["transport"] == "tcp"
    assert "tcp+int8" in shown["reason"]
    await made.carry(made.job(PROMPT), Heard())
    await staged(made)


async def test_no_codes_pass_between_two_exact_workers(made: Cluster) -> None:
    shown = await pair(made, backend=SyntheticBackend)
    assert shown["transport"] == "tcp"
    assert shown["reason"].endswith("no codes: both ends are exact")


async def test_a_pool_that_has_no_codes_says_so_and_works_without(made: Cluster) -> None:
    def windowed(**options: Any) -> Inexact:
        backend = Inexact(**options)
        layout = msgspec.structs.replace(backend.info.layout, windows=(0, 64, 0))
        backend.info = msgspec.structs.replace(backend.info, layout=layout)
        return backend

    shown = await pair(made, backend=windowed)
    assert shown["transport"] == "tcp"
    (decode, _) = workers(made.fleet)["workers"]
    assert "windows" in decode["left_out"]["int8"]


async def test_codes_that_were_damaged_are_prefilled_again(made: Cluster) -> None:
    await pair(made, faults="flip_bit@1")
    heard = Heard()
    timeline = await made.carry(made.job(PROMPT), heard)
    assert len(heard.tokens[0]) == 20
    assert timeline.retries == 1
    await staged(made)


async def test_what_was_decoded_from_codes_is_kept_for_no_later_prompt(made: Cluster) -> None:
    await pair(made, reuse="on")
    for _ in range(2):
        timeline = await made.carry(made.job(PROMPT), Heard())
        assert timeline.present_tokens == 0
    assert timeline.cached_tokens > 0, "the prefill worker's own is exact"
    assert not made.hosts["d"]._ledger._cached
    await staged(made)


async def test_a_cancel_while_codes_are_decoded_frees_all_when_that_is_over(
    made: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    decode = staging.decode

    asked: list[tuple[Any, ...]] = []

    def slowly(*what: Any) -> None:
        asked.append(what)
        begun.set()
        assert go_on.wait(2 * PATIENCE_SECONDS)
        decode(*what)

    monkeypatch.setattr(staging, "decode", slowly)
    await pair(made)
    carrying = asyncio.ensure_future(made.carry(made.job(PROMPT), Heard()))
    await asyncio.to_thread(begun.wait, PATIENCE_SECONDS)
    host = made.hosts["d"]
    carrying.cancel()
    await asyncio.wait([carrying])
    await made.until(lambda: not len(host._requests.landings))
    assert host._ledger.held_for("landing"), "it is being written to"
    assert asked[-1][-1](), "and no longer wanted"
    go_on.set()
    await staged(made)
    monkeypatch.setattr(staging, "decode", decode)
    await made.carry(made.job(PROMPT), Heard())
    await staged(made)


async def test_a_withdrawn_handoff_quarantines_the_pool_for_codes_alone(made: Cluster) -> None:
    await pair(made, faults="delay@*:0.5")
    heard = Heard()
    carrying = asyncio.ensure_future(made.carry(made.job(PROMPT), heard))
    host = made.hosts["d"]
    (pool,) = host._peers.stagings.values()
    await made.until(lambda: pool.ledger.held_for("landing"))
    carrying.cancel()
    await asyncio.wait([carrying])
    await made.until(lambda: not host._ledger.held_for("landing", "headroom"))
    assert not host._ledger.held_for("quarantine")
    await staged(made)


async def test_prompts_that_find_no_room_for_codes_wait_for_it(made: Cluster) -> None:
    await pair(made, quarantine_share=1.0)
    (pool,) = made.hosts["d"]._peers.stagings.values()
    others = Holder("decode", "others")
    pool.ledger.take(pool.ledger.free - pool.layout.blocks_for(len(PROMPT)), others)
    listeners = [Heard() for _ in range(4)]
    await asyncio.gather(*(made.carry(made.job(PROMPT), it) for it in listeners))
    assert all(len(it.tokens[0]) == 20 for it in listeners)
    pool.ledger.release(others)
    await staged(made)


def test_room_for_codes_holds_the_longest_prefix(tmp_path: Path) -> None:
    backend = Inexact(context_tokens=1000, pool_tokens=2000)
    pool = staging.Staging("int8", backend.info, backend.pool)
    assert pool.ledger.blocks * pool.layout.block_tokens >= 1000
    pool.close()
