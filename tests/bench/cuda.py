"""What the engine makes of a GPU, and what it costs that its KV must leave for the host.

    python -m tests.bench.cuda [--model PATH] [--shape] [--json FILE]

Per prompt length: tokens per second of a prefill whose KV is copied to the host layer by layer
(as for a handoff), of one whose KV stays, and of the model's bare matrix products; the time of
that copy alone, and of the same bytes from the GPU into page-locked memory in one piece, which
is what the bus allows. `added_ms` is how much longer the step takes because its KV leaves.
Per decode batch: tokens per second, and of the bare products. All bfloat16; medians of repeats
that take turns.

`--shape` makes a model of Llama-3.2-1B's shape from random numbers, as figures need no sense.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from backends.api import Row, Sampling, Sequence
from backends.emulation import EmulationBackend
from tests.bench.contenders import MatrixProducts, open_checkpoint
from tests.emulation.desk import bundled_model

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
REPEATS = 7
PROMPTS = (512, 2048, 8192)
BATCHES = (1, 8, 32, 128)
CONTEXT = 256


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=None, help="default: the bundled one")
    parser.add_argument("--shape", action="store_true", help="Llama-3.2-1B's, with random weights")
    parser.add_argument("--json", type=Path, help="file for the figures, as JSON lines")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        model = _random_model(Path(folder)) if options.shape else options.model or bundled_model()
        engine = Engine(model)
        lines = [{"device": torch.cuda.get_device_name(), "torch": torch.__version__}]
        most = engine.backend.info.context_tokens
        for tokens in PROMPTS:
            if tokens <= most:
                lines.append(_prefill(engine, tokens))
                print(json.dumps(lines[-1]), flush=True)
        for batch in BATCHES:
            lines.append(_decode(engine, batch))
            print(json.dumps(lines[-1]), flush=True)
    if options.json:
        options.json.write_text("".join(json.dumps(line) + "\n" for line in lines))


class Engine:
    """The backend on the GPU, and the model's products beside it."""

    def __init__(self, model: str) -> None:
        self.backend = EmulationBackend(
            model=model, dtype="bfloat16", device="cuda", pool_tokens=BATCHES[-1] * 2 * CONTEXT
        )
        self.pool = self.backend._pool
        spec = open_checkpoint(Path(model)).spec
        self.products = MatrixProducts(spec, torch.bfloat16, prepacked=False, device="cuda")

    def row(self, tokens: int, start: int = 0, first_block: int = 0) -> Row:
        """`tokens` positions from `start`, sampled greedily."""
        end = start + tokens
        each = self.backend.info.layout.block_tokens
        blocks = list(range(first_block, first_block - (-end // each)))
        one = Sequence(prompt=[1] * end, generated=[], sampling=Sampling(temperature=0.0), seed=1)
        ids = [(7919 * place + 13) % 40000 for place in range(start, end)]
        return Row(tokens=ids, start=start, blocks=blocks, sequences=(one,))

    def step(self, rows: list[Row]) -> None:
        """One step; returns when all of it has ended, KV in the host's copy included."""
        self.backend.step(rows, lambda _row, _layer: None)

    def keeping(self, rows: list[Row]) -> None:
        """The same step, whose KV stays on the GPU."""
        staging, self.pool._staging = self.pool._staging, None
        shadowed, self.pool.shadowed = self.pool.shadowed, False
        try:
            self.step(rows)
            torch.cuda.synchronize()
        finally:
            self.pool._staging, self.pool.shadowed = staging, shadowed

    def copy(self, row: Row) -> None:
        """Only what leaves for the host in that step."""
        with torch.inference_mode():
            blocks = torch.tensor(row.blocks, dtype=torch.int64, device="cuda")
            for layer in range(self.backend.info.layout.layers):
                self.pool.publish(blocks, layer)
            self.pool.settle()


def _prefill(engine: Engine, tokens: int) -> dict[str, Any]:
    row = engine.row(tokens)
    nbytes = len(row.blocks) * engine.backend.info.layout.block_bytes
    there = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    here = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def bus() -> None:
        here.copy_(there, non_blocking=True)
        torch.cuda.synchronize()

    seconds = _turns(
        pushing=lambda: engine.step([row]),
        keeping=lambda: engine.keeping([row]),
        products=synchronised(engine.products.prefill(tokens)),
        copy=lambda: engine.copy(row),
        bus=bus,
    )
    return {
        "prefill": tokens,
        "pushing_tokens_per_second": round(tokens / seconds["pushing"]),
        "keeping_tokens_per_second": round(tokens / seconds["keeping"]),
        "products_tokens_per_second": round(tokens / seconds["products"]),
        "megabytes": round(nbytes / 1e6, 1),
        "copy_gb_per_second": round(nbytes / seconds["copy"] / 1e9, 2),
        "bus_gb_per_second": round(nbytes / seconds["bus"] / 1e9, 2),
        "copy_ms": round(seconds["copy"] * 1e3, 2),
        "added_ms": round((seconds["pushing"] - seconds["keeping"]) * 1e3, 2),
    }


def synchronised(work: Callable[[], None]) -> Callable[[], None]:
    """`work`, over only when the GPU is done with it."""

    def whole() -> None:
        work()
        torch.cuda.synchronize()

    return whole


def _decode(engine: Engine, batch: int) -> dict[str, Any]:
    each = -(-CONTEXT // engine.backend.info.layout.block_tokens)
    for copy in range(batch):
        engine.step([engine.row(CONTEXT, 0, copy * each)])
    rows = [engine.row(1, CONTEXT - 1, copy * each) for copy in range(batch)]
    seconds = _turns(
        step=lambda: engine.step(rows),
        keeping=lambda: engine.keeping(rows),
        products=synchronised(engine.products.decode(batch, CONTEXT)),
    )
    return {
        "decode": batch,
        "context": CONTEXT,
        "tokens_per_second": round(batch / seconds["step"]),
        "keeping_tokens_per_second": round(batch / seconds["keeping"]),
        "products_tokens_per_second": round(batch / seconds["products"]),
    }


def _turns(**contenders: Callable[[], None]) -> dict[str, float]:
    """Seconds of each, the median of repeats that take turns, after two that do not count."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(REPEATS + 2):
        for name, work in contenders.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            work()
            if turn >= 2:
                found[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in found.items()}


def _random_model(folder: Path) -> str:
    """A Hugging Face folder of `SHAPE` with random weights."""
    hidden, wide = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    queries = SHAPE["num_attention_heads"] * SHAPE["head_dim"]
    keys = SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
    shapes = {"model.embed_tokens.weight": (SHAPE["vocab_size"], hidden)}
    for layer in range(SHAPE["num_hidden_layers"]):
        inside = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": it for name, it in inside.items()}
    shapes["model.norm.weight"] = (hidden,)
    torch.manual_seed(1)
    weights = {
        name: (torch.randn(it, device="cuda") * 0.02 + float(len(it) == 1)).to(torch.bfloat16).cpu()
        for name, it in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return str(folder)


if __name__ == "__main__":
    main()
