"""KV of the TensorRT-LLM stand-in in vLLM's blocks: number by number what the tokens say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.testing.engine.desk import EngineDesk
from tests.life.cluster import Heard
from tests.trtllm.handing import empty, numbers, prefill_for, written

SALT = b"standin"


@pytest.mark.parametrize("name", ["d", "h"])
async def test_every_number_is_in_the_blocks_of_vllm(
    name: str, vllm: Any, redis_url: str, tmp_path: Path
) -> None:
    """Read back as vLLM keeps them for the next prompt: it exports what it did not compute."""
    engine = vllm[name]
    layout = engine.info.layout
    prompt = list(range(5, 5 + 7 * layout.block_tokens))
    async with prefill_for(redis_url, tmp_path, engine.info) as made:
        await made.start("d", "decode", backend=engine)
        await made.paired()
        heard = Heard()
        timeline = await made.carry(made.job(prompt, max_tokens=3, salt=SALT), heard)
        assert timeline.retries == 0
        await empty(made)
    desk = EngineDesk(engine)
    again = desk.done(desk.prefill([*prompt, heard.tokens[0][0]], seeds=(), salt=SALT))
    assert again.story.cached == len(prompt)
    found = numbers(layout, engine.pool, list(again.blocks), len(prompt))
    assert np.array_equal(found, written(layout, prompt))
