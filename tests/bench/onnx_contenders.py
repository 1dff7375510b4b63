"""The ONNX Runtime engine by its `step`, and the same graph with that library's own attention.

The latter has its KV in one piece for each sequence, no pool and no host around it: what pages,
batching and sampling cost is the difference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from backends.checkpoint.opening import open_checkpoint
from backends.checkpoint.rope import inverse_frequencies
from backends.onnxruntime import OnnxRuntimeBackend
from backends.onnxruntime.graph import Graph, build
from backends.onnxruntime.packing import Weights
from tests.bench.contenders import BLOCK_TOKENS, Engine, Work, prompt

_MICROSOFT = "com.microsoft"


class OnnxRuntime(Engine):
    """`OnnxRuntimeBackend`, made anew when the threads change."""

    def __init__(self, model: Path, pool_tokens: int, weights: str) -> None:
        self.name = f"onnxruntime {weights}"
        self._made = {
            "model": str(model),
            "weights": weights,
            "pool_tokens": pool_tokens,
            "block_tokens": BLOCK_TOKENS,
        }
        self.set_threads(1)

    def set_threads(self, threads: int) -> None:
        self.backend = OnnxRuntimeBackend(**self._made, threads=threads)


class WithoutPages:
    """The graph with `GroupQueryAttention`, in the library's Python interface."""

    def __init__(self, model: Path, weights: str) -> None:
        self.name = f"{weights}, no pages"
        self._packed = weights == "q4"
        self._checkpoint = open_checkpoint(model)
        self._spec = self._checkpoint.spec
        self._threads = 1

    def set_threads(self, threads: int) -> None:
        self._threads = threads

    def prefill(self, tokens: int) -> Work:
        return self._work(1, tokens, tokens)

    def decode(self, batch: int, context: int) -> Work:
        return self._work(batch, 1, context)

    def _work(self, batch: int, tokens: int, context: int) -> Work:
        """Compute the last `tokens` of `context` positions for each of `batch` sequences."""
        import onnxruntime

        spec = self._spec
        pool = [batch, spec.kv_heads, context, spec.head_dim]
        names = [f"{part}{layer}" for layer in range(spec.layers) for part in "kv"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        session = onnxruntime.InferenceSession(
            self._model(batch, pool, names, context), options, providers=["CPUExecutionProvider"]
        )
        binding = session.io_binding()
        ids = prompt(batch * tokens, spec.vocabulary)
        last = np.arange(batch) * tokens + tokens - 1
        inputs = {
            "tokens": np.array(ids),
            "wanted": last,
            "lengths": np.full(batch, context - 1, np.int32),
            "longest": np.array([context], np.int32),
        }
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for name in names:
            value = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(pool, np.float32))
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(f"new_{name}", value)
        binding.bind_output("logits")

        def work() -> Any:
            session.run_with_iobinding(binding)
            return binding.get_outputs()[-1].numpy().argmax(1)

        return work

    def _model(self, batch: int, pool: list[int], names: list[str], context: int) -> bytes:
        spec, value = self._spec, helper.make_tensor_value_info
        wide = (spec.heads + 2 * spec.kv_heads) * spec.head_dim

        def attend(graph: Graph, products: str, layer: int) -> str:
            (rows,) = graph.node("Reshape", [products, graph.shape(batch, -1, wide)])
            found = [f"mixed{layer}", f"new_k{layer}", f"new_v{layer}"]
            given = [rows, "", "", f"k{layer}", f"v{layer}", "lengths", "longest", "cos", "sin"]
            graph.nodes.append(
                helper.make_node(
                    "GroupQueryAttention",
                    given,
                    found,
                    domain=_MICROSOFT,
                    num_heads=spec.heads,
                    kv_num_heads=spec.kv_heads,
                    do_rotary=1,
                    rotary_interleaved=int(spec.pairing == "interleaved"),
                )
            )
            flat = graph.shape(-1, spec.heads * spec.head_dim)
            return graph.node("Reshape", [found[0], flat])[0]

        weights = Weights(self._checkpoint, spec.pairing, packed=self._packed)
        graph = build(weights, attend)
        angles = np.outer(np.arange(context), inverse_frequencies(spec))
        given = {"cos": np.cos(angles), "sin": np.sin(angles)}
        arrays = {name: it.astype(np.float32) for name, it in given.items()} | graph.weights
        whole = helper.make_graph(
            graph.nodes,
            "without_pages",
            [
                value("tokens", TensorProto.INT64, ["token"]),
                value("wanted", TensorProto.INT64, ["row"]),
                value("lengths", TensorProto.INT32, [batch]),
                value("longest", TensorProto.INT32, [1]),
                *(value(name, TensorProto.FLOAT, pool) for name in names),
            ],
            [
                value("logits", TensorProto.FLOAT, ["row", spec.vocabulary]),
                *(value(f"new_{name}", TensorProto.FLOAT, pool) for name in names),
            ],
            [*graph.shapes, *(numpy_helper.from_array(it, name) for name, it in arrays.items())],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(_MICROSOFT, 1)]
        model = helper.make_model(whole, opset_imports=opsets, ir_version=10)
        found: bytes = model.SerializeToString()
        return found
