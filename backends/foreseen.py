"""What KV of a worker will look like, told from its options and its model's files alone.

For the backends that come along; nothing is loaded and no plug-in is imported. What only the
engine itself knows (a dtype chosen by the device, how a file's numbers are kept) is left open, and
so is everything about other plug-ins: it is compared when the workers meet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from backends.checkpoint.gguf_file import GGUFCheckpoint
from backends.checkpoint.huggingface import read_spec
from backends.checkpoint.opening import check_model_path, open_checkpoint
from backends.checkpoint.spec import ModelSpec
from backends.errors import BackendMisconfigured
from backends.tensorrt_llm.geometry import heads_of_rank
from backends.tensorrt_llm.model import weights_of
from transfer.layout import KVLayout
from transfer.plan import plan

Options = Mapping[str, Any]


class Untold(Exception):
    """It cannot be told from here; says why. The worker itself may well know."""


class Foreseen(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a layout; None is what is not.

    `path` are the model's files and `identity` what it is called in their place, if anything.
    """

    layers: int
    kv_heads: int
    head_dim: int
    rope: str
    block_tokens: int
    dtype: str | None
    weights: str | None
    path: Path | None
    identity: str = ""
    pools: int = 1

    def layout(self, like: Foreseen, model: str) -> KVLayout:
        """As a layout, what is not known filled in as the other side has it."""
        return msgspec.convert(
            {
                "model": model,
                "weights": self.weights or like.weights or "unknown",
                "layers": self.layers,
                "kv_heads": self.kv_heads,
                "head_dim": self.head_dim,
                "dtype": self.dtype or like.dtype or "bfloat16",
                "block_tokens": self.block_tokens,
                "rope": self.rope,
            },
            KVLayout,
        )


def foresee(backend: str, options: Options, model: str) -> Foreseen:
    """What a worker of this backend will have; `model` are its files, if no option names them.

    Raises:
        Untold: nobody knows yet.
        BackendMisconfigured: it cannot share its heads out to so many devices.
    """
    known = _KNOWN.get(backend)
    if known is None:
        raise Untold(f"what {backend} keeps is known when it runs")
    return known(options if backend in _WITHOUT_FILES else {"model": model, **options})


def compare(source: Foreseen, target: Foreseen, *, allow_unlike_weights: bool = False) -> str:
    """How one becomes the other, in one line.

    Raises:
        LayoutMismatch: it cannot; names the first reason.
        Untold: a model's files cannot be read here.
    """
    ours, theirs = _names(source, target)
    layouts = source.layout(target, ours), target.layout(source, theirs)
    line = plan(*layouts, allow_unlike_weights=allow_unlike_weights).line
    if source.pools == target.pools == 1:
        return line
    return f"{source.pools} to {target.pools} pools; {line}"


def _names(source: Foreseen, target: Foreseen) -> tuple[str, str]:
    """What both models are called; files are looked into only where they are not the same ones."""
    if source.path == target.path and source.identity == target.identity:
        return ("the same", "the same")
    return _identity(source), _identity(target)


def _identity(side: Foreseen) -> str:
    if side.identity or side.path is None:
        return side.identity
    try:
        checkpoint = open_checkpoint(side.path)
    except BackendMisconfigured as error:
        raise Untold(str(error)) from error
    checkpoint.close()
    return checkpoint.identity


def _model(options: Options) -> tuple[Path, ModelSpec]:
    try:
        path = check_model_path(str(options.get("model", "")))
        if path.is_dir():
            return path, read_spec(path)
        checkpoint = GGUFCheckpoint(path)
    except BackendMisconfigured as error:  # it may lie on the worker's machine alone
        raise Untold(str(error)) from error
    checkpoint.close()
    return path, checkpoint.spec


def _of_checkpoint(
    options: Options, *, dtype: Any, weights: Any, block_tokens: int = 16, **more: Any
) -> Foreseen:
    path, spec = _model(options)
    rope = options.get("rope", "auto")
    return Foreseen(
        layers=spec.layers,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        rope=spec.pairing if rope == "auto" else rope,
        block_tokens=options.get("block_tokens", block_tokens),
        dtype=None if dtype == "auto" else dtype,
        weights=None if weights == "auto" else weights,
        path=path,
        **more,
    )


def _emulation(options: Options) -> Foreseen:
    weights = options.get("dtype", "auto")
    kv_dtype = options.get("kv_dtype", "auto")
    pools = options.get("shards", 1)
    dtype = weights if kv_dtype == "auto" else kv_dtype
    return _of_checkpoint(options, dtype=dtype, weights=weights, pools=pools)


def _onnxruntime(options: Options) -> Foreseen:
    kv_dtype = options.get("kv_dtype", "auto")
    dtype = "float32" if kv_dtype == "auto" else kv_dtype
    return _of_checkpoint(options, dtype=dtype, weights=options.get("weights", "auto"))


def _llamacpp(options: Options) -> Foreseen:
    weights = options.get("weights", "file")
    dtype = options.get("kv_dtype", "float16")
    return _of_checkpoint(options, dtype=dtype, weights="auto" if weights == "file" else weights)


def _vllm(options: Options) -> Foreseen:
    dtype = options.get("dtype", "bfloat16")
    return _of_checkpoint(options, dtype=dtype, weights=dtype, block_tokens=32)


def _tensorrt_llm(options: Options) -> Foreseen:
    path, spec = _model(options)
    ranks = options.get("tensor_parallel", 1)
    heads = heads_of_rank(0, ranks, spec.kv_heads).count
    weights = options.get("weights") or weights_of(path, options.get("dtype", "auto"))
    computed = weights_of(path, options.get("dtype", "auto"))
    fp8 = options.get("kv_dtype") == "fp8"
    dtype = computed if computed in ("float32", "float16", "bfloat16") else "auto"
    return _of_checkpoint(
        options,
        dtype="float8_e4m3" if fp8 else dtype,
        weights=weights,
        block_tokens=32,
        identity=options.get("identity", ""),
        pools=spec.kv_heads // heads,
    )


def _synthetic(options: Options) -> Foreseen:
    if options.get("model_shape") is not None:
        raise Untold("its shape is that of a model elsewhere")
    vocabulary = options.get("vocabulary", 49152)
    return Foreseen(
        layers=options.get("layers") or 2,
        kv_heads=options.get("kv_heads") or 2,
        head_dim=options.get("head_dim") or 64,
        rope="half",
        block_tokens=options.get("block_tokens", 16),
        dtype=options.get("dtype", "float16"),
        weights="synthetic",
        path=None,
        identity=f"{options.get('model', 'synthetic')}/{vocabulary}",
    )


_WITHOUT_FILES = frozenset({"synthetic"})

_KNOWN: Mapping[str, Callable[[Options], Foreseen]] = {
    "emulation": _emulation,
    "llamacpp": _llamacpp,
    "onnxruntime": _onnxruntime,
    "synthetic": _synthetic,
    "tensorrt_llm": _tensorrt_llm,
    "vllm": _vllm,
}
