"""What `config.json` says of a model."""

import json
from pathlib import Path


def read(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def shape(args):
    """Layers, KV heads, their width and the dtype of the pool."""
    config = read(args.model)
    heads = config["num_attention_heads"]
    dtype = args.kv_cache_config.dtype
    if dtype == "auto":
        dtype = args.dtype if args.dtype != "auto" else config.get("torch_dtype", "bfloat16")
    return (
        config["num_hidden_layers"],
        config.get("num_key_value_heads", heads),
        config.get("head_dim", config["hidden_size"] // heads),
        dtype,
    )
