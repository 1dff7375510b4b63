"""KV of the TensorRT-LLM stand-in in llama.cpp's cells: number by number what the tokens say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.testing.desk import Desk
from backends.testing.site import Lent
from tests.life.cluster import Heard
from tests.llamacpp.conftest import ABSENT, installed
from tests.trtllm.handing import empty, prefill_for, written

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not installed("llama_cpp"), reason=ABSENT)]

PROMPT = list(range(5, 205))


class Reading(Lent):
    """Reads after its first step what llama.cpp holds, through its sequence states."""

    def __init__(self, backend: Any) -> None:
        super().__init__(backend)
        self.found: list[Any] = []

    def step(self, batch: Any, ready: Any) -> Any:
        outputs = self._backend.step(batch, ready)
        self.found = self.found or [*cells(self._backend, len(PROMPT))]
        return outputs


def cells(backend: Any, count: int) -> Iterator[Any]:
    """The first positions of each sequence of the last step: [token, layer, K|V, head, dim]."""
    from backends.llamacpp.cells import SCRATCH
    from backends.llamacpp.state import State

    memory, known, layout = backend._context, backend._cells, backend.info.layout
    for held in known._held.values():
        if held.used != known._turn:
            continue
        state = State(known._form, count)
        memory.share(held.sequence, SCRATCH, 0, count)
        memory.read(SCRATCH, state)
        memory.drop(SCRATCH)
        state.check(0)
        both = np.stack([state.keys, state.values]).transpose(2, 1, 0, 3)
        yield both.reshape(*both.shape[:3], layout.kv_heads, layout.head_dim)


@pytest.mark.parametrize("desk", ["full", "shipped"])
async def test_every_number_is_in_the_cells_of_every_sequence(
    desk: str, request: pytest.FixtureRequest, redis_url: str, tmp_path: Path
) -> None:
    """Float32 with V transposed, and float16 without; both pair RoPE otherwise than the source."""
    decoder: Desk = request.getfixturevalue(desk)
    reading = Reading(decoder.backend)
    assert decoder.layout.rope == "interleaved"
    async with prefill_for(redis_url, tmp_path, decoder.info) as made:
        await made.start("d", "decode", backend=reading)
        await made.paired()
        heard = Heard()
        timeline = await made.carry(made.job(PROMPT, n=2, max_tokens=3), heard)
        assert timeline.retries == 0
        await empty(made)
    expected = written(decoder.layout, PROMPT)
    assert len(reading.found) == 2
    for found in reading.found:
        assert np.array_equal(found, expected)
