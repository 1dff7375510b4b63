"""A prefill worker on the stand-in, and what must lie in a decoder's memory after a handoff."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from backends.api import BackendInfo, KVLayout, Row
from backends.emulation.pattern import CANONICAL, Pattern
from tests.life.cluster import Cluster, cluster
from tests.support.patience import PATIENCE_SECONDS
from tests.trtllm.play import Gates, standin, write_model

SYNTHETIC = {"identity": "synthetic/49152", "weights": "synthetic"}


@asynccontextmanager
async def prefill(
    redis_url: str,
    folder: Path,
    *,
    model: dict[str, Any] | None = None,
    knobs: dict[str, Any] | None = None,
    processes: bool = False,
    host: dict[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[Cluster]:
    """A cluster with a prefill worker `p` on the stand-in, of the synthetic backend's shape."""
    folder.mkdir(exist_ok=True)
    path = write_model(folder / "model", **(model or {}))
    gates = Gates(folder / "gates")
    settings: dict[str, Any] = {
        "model": str(path),
        "block_tokens": 32,
        "pool_tokens": 4096,
        "chunk_tokens": 64,
        "kv_cache": {"max_tokens": 4096},
        **SYNTHETIC,
        **options,
    }
    with standin("1.3", processes=processes, gates=str(gates), **(knobs or {})):
        from backends.tensorrt_llm.engine import TensorRTLLM

        async with cluster(redis_url) as made:
            engine = TensorRTLLM(**settings)
            await made.start("p", "prefill", backend=engine, host=host)
            made.gates, made.engine = gates, engine  # type: ignore[attr-defined]
            try:
                yield made
            finally:
                for gate in (folder / "gates").glob("*"):
                    gate.unlink(missing_ok=True)


def prefill_for(redis_url: str, folder: Path, decoder: BackendInfo, **options: Any) -> Any:
    """As `prefill`, with the model of a decoder that is no synthetic one."""
    layout = decoder.layout
    shape = {"layers": layout.layers, "kv_heads": layout.kv_heads, "head_dim": layout.head_dim}
    shape["vocab_size"] = decoder.vocabulary
    known = {"identity": layout.model, "weights": layout.weights}
    return prefill(redis_url, folder, model=shape, **known, **options)


async def empty(made: Any, seconds: float = PATIENCE_SECONDS) -> None:
    """No block is held on either side, nor in the engine."""
    await made.balanced(seconds)
    await made.until(lambda: not made.engine.pins() and not made.engine._carrier._jobs, seconds)
    await made.until(lambda: made.engine._library._llm.pinned == 0, seconds)


def written(layout: KVLayout, tokens: list[int]) -> Any:
    """What the stand-in's formula says of a prefix: [token, layer, K|V, head, dim].

    Raw numbers in the dtype of `layout`, K in its RoPE pairing; the stand-in's own is "half".
    """
    blocks = layout.blocks_for(len(tokens))
    plain = msgspec.structs.replace(layout, axes=" ".join(CANONICAL))
    pool = np.zeros(plain.block_bytes * blocks, np.uint8)
    pattern = Pattern(plain, pool, blocks)
    pattern.write(pattern.place([Row(tokens=tokens, start=0, blocks=list(range(blocks)))]))
    found = numbers(plain, pool, list(range(blocks)), len(tokens))
    if layout.rope == "interleaved":
        keys = found[:, :, 0]
        pairs = keys.reshape(*keys.shape[:-1], 2, -1).swapaxes(-1, -2)
        found[:, :, 0] = pairs.reshape(keys.shape)
    return found


def numbers(layout: KVLayout, pool: Any, blocks: list[int], tokens: int) -> Any:
    """A copy of what lies in these blocks of a pool, as `written` has it."""
    words = layout.axes.split()
    item = np.dtype(f"u{layout.item_bytes}")
    raw = np.frombuffer(pool, np.uint8).view(item)
    sizes = layout.sizes(raw.nbytes // layout.block_bytes)
    shaped = raw.reshape(tuple(sizes.values()))
    ordered = shaped.transpose([words.index(axis) for axis in CANONICAL])[blocks]
    return ordered.reshape(-1, *ordered.shape[2:])[:tokens]
