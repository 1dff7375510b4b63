"""A GGUF file so small that a test writes one of its own."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np


def write_gguf(path: Path, arch="llama", *, drop=(), extra=None, tensors=None, context=128) -> Path:
    """A tiny model in Q8_0, F16 and F32, written by the `gguf` package."""
    writer = gguf.GGUFWriter(path, arch)
    fields = {
        "block_count": 1, "context_length": context, "embedding_length": 32,
        "feed_forward_length": 64, "attention.head_count": 4, "attention.head_count_kv": 2,
    }  # fmt: skip
    for name, value in fields.items():
        if name not in drop:
            writer.add_uint32(f"{arch}.{name}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(100)])
    writer.add_array("tokenizer.ggml.scores", [float(i) for i in range(100)])
    writer.add_uint32("tokenizer.ggml.eos_token_id", 9)
    writer.add_uint32("tokenizer.ggml.eot_token_id", 4)
    for name, value in (extra or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(name, value)
    numbers = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (100, 32), "output_norm.weight": (32,),
        "blk.0.attn_norm.weight": (32,), "blk.0.ffn_norm.weight": (32,),
        "blk.0.attn_q.weight": (32, 32), "blk.0.attn_k.weight": (16, 32),
        "blk.0.attn_v.weight": (16, 32), "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_gate.weight": (64, 32), "blk.0.ffn_up.weight": (64, 32),
        "blk.0.ffn_down.weight": (32, 64), **(tensors or {}),
    }  # fmt: skip
    for name, shape in shapes.items():
        values = numbers.standard_normal(shape).astype(np.float32)
        if "ffn" in name and len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            half = "attn_q" in name and len(shape) == 2
            writer.add_tensor(name, values.astype(np.float16) if half else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
