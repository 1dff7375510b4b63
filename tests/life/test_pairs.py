"""How two workers agree on a transport, what becomes of that, and what is shown of it."""

import asyncio
import json
from functools import partial

import msgspec
import pytest

from backends.emulation.synthetic import SyntheticBackend
from backends.host import HostConfig
from backends.host.peers import Peers
from gateway.server import workers
from tests.life.cluster import DECODE, PREFILL, Cluster, Heard, cluster
from transfer.errors import PeerLost
from transfer.nixl import available


async def pair(made: Cluster, ours: tuple[str, ...], theirs: tuple[str, ...]) -> None:
    await made.start("p", "prefill", host={"transports": ours}, **PREFILL)
    await made.start("d", "decode", host={"transports": theirs}, **DECODE)


async def answered(made: Cluster) -> None:
    heard = Heard()
    await made.carry(made.job(list(range(40)), max_tokens=5), heard)
    assert len(heard.tokens[0]) == 5


async def test_on_one_machine_memory_is_shared_and_it_is_said_why(redis_url: str) -> None:
    async with cluster(redis_url) as made:
        await pair(made, ("auto",), ("auto",))
        await made.paired()
        await answered(made)
        shown = workers(made.fleet)
        (both,) = shown["pairs"]
        assert (both["prefill"], both["decode"], both["refusal"]) == ("p", "d", "")
        assert both["transport"] in ("shm", "tcp")  # whichever was quicker just now
        assert "same host" in both["reason"]
        assert all(f"{name} " in both["reason"] for name in ("shm", "tcp"))
        assert "axes layer kv block token head dim -> " in both["plan"]
        assert not both["shunned"]
        assert not both["unlike_weights"]
        one, other = shown["workers"]
        assert (one["worker"], one["role"], one["transports"]) == ("d", "decode", ["shm", "tcp"])
        assert (other["worker"], other["transports"]) == ("p", [])
        assert one["layout"] != other["layout"]
        blocks = made.hosts["d"]._info.pool_blocks
        assert one["load"]["pool_blocks"] == blocks
        shown_load = json.loads(msgspec.json.encode(one["load"]))
        idle = {"running": 0, "waiting": 0, "waiting_tokens": 0, "quarantined": 0}
        assert {name: shown_load[name] for name in idle} == idle
        assert (shown_load["draining"], shown_load["shunned"]) == (False, [])
        assert set(shown_load) == {*idle, "pool_blocks", "free_blocks", "draining", "shunned"}


@pytest.mark.skipif(not available(), reason="NIXL is not installed")
async def test_a_transport_that_fails_as_it_starts_is_left_out_and_it_is_said_why(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", "nothing_of_this_name")
    tempting = partial(Peers, auto=("shm", "nixl", "tcp"))
    async with cluster(redis_url) as made:
        await made.start("p", "prefill", peers=tempting, **PREFILL)
        await made.start("d", "decode", peers=tempting, **DECODE)
        await made.paired()
        await answered(made)
        one, _ = workers(made.fleet)["workers"]
        assert one["transports"] == ["shm", "tcp"]
        assert list(one["left_out"]) == ["nixl"]
        assert "NIXL_ERR_BACKEND" in one["left_out"]["nixl"]


@pytest.mark.skipif(not available(), reason="NIXL is not installed")
async def test_a_transport_that_fails_at_one_end_only_is_passed_over_and_it_is_said_why(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tempting = partial(Peers, auto=("shm", "nixl", "tcp"))
    async with cluster(redis_url) as made:
        monkeypatch.setenv("UCX_TLS", "tcp")
        await made.start("d", "decode", peers=tempting, **DECODE)
        monkeypatch.setenv("UCX_TLS", "nothing_of_this_name")
        await made.start("p", "prefill", peers=tempting, **PREFILL)
        await made.paired()
        await answered(made)
        shown = workers(made.fleet)
        assert shown["workers"][0]["transports"] == ["shm", "nixl", "tcp"]
        (both,) = shown["pairs"]
        assert both["transport"] in ("shm", "tcp")
        assert "nixl refused: " in both["reason"]
        assert "NIXL_ERR_BACKEND" in both["reason"]


@pytest.mark.skipif(not available(), reason="NIXL is not installed")
async def test_a_transport_that_was_asked_for_by_name_is_not_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UCX_TLS", "nothing_of_this_name")
    backend = SyntheticBackend()
    config = HostConfig(id="d", role="decode", listen="", transports=("nixl", "tcp"))
    peers = Peers(config, backend.info, backend.pool, lambda _: None)
    with pytest.raises(OSError, match="NIXL_ERR_BACKEND"):
        await peers.listen()
    await peers.close()


@pytest.mark.parametrize("name", ["shm", "tcp"])
async def test_what_is_named_is_used(redis_url: str, name: str) -> None:
    async with cluster(redis_url) as made:
        await pair(made, ("auto",), (name,))
        await made.paired()
        await answered(made)
        ((_, _, met),) = made.fleet.pairs
        assert met.transport == name
        await made.balanced()


async def test_nixl_is_used_where_it_is_named(redis_url: str) -> None:
    pytest.importorskip("nixl_cu12")
    async with cluster(redis_url) as made:
        await pair(made, ("nixl",), ("tcp", "nixl"))
        await made.paired()
        await answered(made)
        ((_, _, met),) = made.fleet.pairs
        assert met.transport == "nixl"
        await made.balanced()


async def test_workers_without_a_transport_in_common_are_refused_with_the_reason(
    redis_url: str,
) -> None:
    async with cluster(redis_url) as made:
        await pair(made, ("tcp",), ("shm",))
        await made.until(lambda: bool(made.fleet.pairs))
        ((_, _, met),) = made.fleet.pairs
        assert met.refusal == "d offers no transport that this worker has"
        assert not made.fleet.snapshot().pairs


async def test_a_connection_that_is_lost_is_made_again_before_anything_is_placed(
    redis_url: str,
) -> None:
    async with cluster(redis_url) as made:
        await pair(made, ("auto",), ("shm",))
        await made.paired()
        (receiver,) = made.hosts["d"]._peers._receivers
        seen = []

        async def watch() -> None:
            while True:
                seen.append(bool(made.fleet.snapshot().pairs))
                await made.fleet.changed()

        watching = asyncio.ensure_future(watch())
        for session in list(receiver._sessions.values()):
            session.end(PeerLost("cut"))
        await made.until(lambda: False in seen)
        await made.paired()
        await answered(made)
        watching.cancel()
        await made.balanced()
