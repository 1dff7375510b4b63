"""Servers behind a whole Baton, and the programs that measure them, without vLLM."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from aiohttp import ClientSession

from gateway.cli.model import find_model
from tests.vllm_engine.bench import Load, baton, play, routed
from tests.vllm_engine.fake_server import TOKENS, serving
from tests.vllm_engine.servers import NAME

LOAD = Load(
    requests=5, per_second=50.0, shortest=8, longest=32, answer=len(TOKENS), dtype="-", seed=3
)


def test_a_trace_is_the_same_each_time() -> None:
    trace = LOAD.trace()
    assert trace == LOAD.trace()
    assert len(trace) == 5
    assert trace[0][0] == 0
    assert [at for at, _ in trace] == sorted(at for at, _ in trace)
    assert all(8 <= len(prompt) <= 32 for _, prompt in trace)


async def test_a_router_before_two_servers_is_measured() -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with serving() as prefill, serving() as decode:
            prefill.models = decode.models = [{"id": NAME, "max_model_len": 100}]
            routing = routed(Path(folder), prefill.address, decode.address)
            address = await asyncio.to_thread(routing.__enter__)
            try:
                outcome = await play(address, LOAD)
            finally:
                await asyncio.to_thread(routing.__exit__, None, None, None)
    assert (outcome.tokens, len(outcome.firsts)) == (20, 5)
    assert len(outcome.gaps) == 15
    assert len(prefill.asked) == len(decode.asked) == 8  # three of them to warm up


async def test_a_whole_baton_before_two_servers_answers_and_is_measured(tmp_path: Path) -> None:
    model = find_model("bundled")
    async with serving() as prefill, serving() as decode:
        prefill.models = decode.models = [{"id": NAME, "max_model_len": 100}]
        options = {"prefill": prefill.address, "decode": decode.address}
        workers = {"fleet": {"role": "both", "backend": "vllm-served", "options": options}}
        running = baton(tmp_path, model, workers)
        address = await asyncio.to_thread(running.__enter__)
        try:
            outcome = await play(address, LOAD)
            async with ClientSession(address) as session:
                shown = await (await session.get("/debug/ledger")).json()
        finally:
            await asyncio.to_thread(running.__exit__, None, None, None)
    assert (outcome.tokens, len(outcome.firsts)) == (20, 5)
    assert len(prefill.asked) == len(decode.asked) == 8
    assert shown["balanced"]
    assert all(it["free_blocks"] == it["pool_blocks"] for it in shown["workers"])
