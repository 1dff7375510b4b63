"""From the stand-in through a real handoff to each decoder, number by number in its pool."""

import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.emulation import EmulationBackend
from backends.onnxruntime import OnnxRuntimeBackend
from backends.testing.tiny import write_tiny_model
from gateway.errors import DeadlineExceeded, GatewayError, NoWorkers, WorkerFailed
from tests.life.cluster import DECODE, Heard
from tests.third_party.abacus_decode import AbacusBackend
from tests.trtllm.handing import empty, numbers, prefill, prefill_for, written

PROMPT = list(range(5, 205))
AXES = (
    "block layer kv head token dim",
    "layer kv block token head dim",
    "head token layer kv block dim",
)


class Looking:
    """A decode backend that looks at every number of what has landed in its pool."""

    def __init__(self, inner: Any, prefix: list[int]) -> None:
        self._inner, self._prefix = inner, prefix
        self.info, self.pool = inner.info, inner.pool
        self.step, self.copy_blocks, self.close = inner.step, inner.copy_blocks, inner.close
        self.right: list[bool] = []

    def ingest(self, blocks: Any) -> None:
        layout, count = self.info.layout, len(self._prefix)
        found = numbers(layout, self.pool, list(blocks)[: layout.blocks_for(count)], count)
        self.right.append(np.array_equal(found, written(layout, self._prefix)))
        self._inner.ingest(blocks)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("axes", AXES)
async def test_every_number_reaches_the_synthetic_decoder(
    redis_url: str, tmp_path: Path, transport: str, axes: str
) -> None:
    """It looks at all of them before its first step (`verify_kv`), for three sequences."""
    host = {"transports": (transport,)}
    async with prefill(redis_url, tmp_path, host=host) as made:
        await made.start("d", "decode", host=host, block_tokens=16, axes=axes)
        await made.paired()
        for length in (200, 31, 1):
            heard = Heard()
            timeline = await made.carry(made.job(PROMPT[:length], n=3), heard)
            assert timeline.retries == 0
            assert [len(line) for line in heard.tokens.values()] == [20] * 3
        await empty(made)


DECODERS = {
    "torch": lambda model: EmulationBackend(model=model, dtype="float32", rope="half", **CUT),
    "onnxruntime": lambda model: OnnxRuntimeBackend(model=model, rope="interleaved", **CUT),
    "abacus": lambda model: AbacusBackend(model=model, pool_tokens=1024),
}
CUT = {"pool_tokens": 1024, "axes": "layer kv block token head dim"}


@pytest.mark.parametrize("decoder", DECODERS)
async def test_every_number_reaches_the_decoder(
    redis_url: str, tmp_path: Path, decoder: str
) -> None:
    """Whose pool has another block size, order, dtype and RoPE pairing."""
    model = write_tiny_model(tmp_path)
    inner: Any = DECODERS[decoder](str(model))
    decode = Looking(inner, PROMPT)
    async with prefill_for(redis_url, tmp_path / "p", inner.info) as made:
        await made.start("d", "decode", backend=decode)
        await made.paired()
        heard = Heard()
        timeline = await made.carry(made.job(PROMPT, max_tokens=2), heard)
        assert timeline.retries == 0
        assert decode.right == [True]
        await empty(made)


async def test_every_rank_pushes_its_own_heads(redis_url: str, tmp_path: Path) -> None:
    async with prefill(redis_url, tmp_path, processes=True, tensor_parallel=2) as made:
        await made.start("d", "decode", block_tokens=16)
        await made.paired()
        ((_, _, met),) = made.fleet.pairs
        assert met.plan.startswith("2 to 1 pools; ")
        heard = Heard()
        timeline = await made.carry(made.job(PROMPT, n=2), heard)
        assert (timeline.retries, len(heard.tokens)) == (0, 2)
        await empty(made)


async def test_a_damaged_handoff_is_done_again(redis_url: str, tmp_path: Path) -> None:
    async with prefill(redis_url, tmp_path, host={"faults": "flip_bit@1"}) as made:
        await made.start("d", "decode", **DECODE)
        await made.paired()
        heard = Heard()
        timeline = await made.carry(made.job(PROMPT), heard)
        assert (timeline.retries, len(heard.tokens[0])) == (1, 20)
        await empty(made)


@pytest.mark.parametrize("cancel", ["hook", "recycle"])
@pytest.mark.parametrize("gate", ["before_pass", "after_chunk", "before_finish", "pinned"])
async def test_a_client_that_leaves_at_any_stage_leaves_nothing_behind(
    redis_url: str, tmp_path: Path, gate: str, cancel: str
) -> None:
    async with prefill(redis_url, tmp_path, knobs={"cancel": cancel}) as made:
        await made.start("d", "decode", **DECODE)
        await made.paired()
        made.gates.shut(gate)
        leaving = asyncio.ensure_future(made.carry(made.job(PROMPT), Heard()))
        await made.until(lambda: made.gates.reached(gate))
        staying_heard = Heard()
        staying = asyncio.ensure_future(made.carry(made.job(PROMPT[9:]), staying_heard))
        leaving.cancel()
        await asyncio.wait([leaving])
        made.gates.open(gate)
        timeline = await staying
        assert (timeline.retries, len(staying_heard.tokens[0])) == (0, 20)
        await empty(made)


async def test_an_engine_that_hangs_costs_its_worker_and_nobody_else(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process would end; what was set aside for it on the other side is free again."""
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    host = {"step_timeout_seconds": 0.5}
    async with prefill(redis_url, tmp_path, host=host) as made:
        await made.start("d", "decode", **DECODE)
        await made.paired()
        made.gates.shut("before_pass")
        with pytest.raises(GatewayError) as raised:
            await made.carry(made.job(PROMPT, seconds=3.0), Heard())
        assert isinstance(raised.value, WorkerFailed | DeadlineExceeded | NoWorkers)
        assert ended == [os.EX_SOFTWARE]
        await made.kill("p")
        await made.balanced()
        made.gates.open("before_pass")
