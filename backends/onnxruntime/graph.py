"""The model as a graph: from token ids to the logits of those tokens that are wanted.

The graph names its weights and holds none of them: they are handed to the session beside it.
Attention, with RoPE and the pool, is an operator of ours (`attention.py`); all else is ONNX
Runtime's. Whatever a token gives is the same to the bit beside whichever other tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from backends.onnxruntime.library import DOMAIN, OPERATOR
from backends.onnxruntime.packing import BLOCK, Matrix, Packed, Weights

_MICROSOFT = "com.microsoft"
_OPSETS = {"": 21, _MICROSOFT: 1, DOMAIN: 1}
_IR_VERSION = 10
_INT8_ACTIVATIONS = 4
_KINDS = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8}

Array = NDArray[Any]
TOKENS, WANTED, LOGITS = "tokens", "wanted", "logits"


class Graph:
    """Nodes in order, and the arrays that they name."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.weights: dict[str, Array] = {}
        self._count = 0
        self._sums: dict[str, str] = {}
        self._given: dict[str, Array] = {}
        self.shapes: list[TensorProto] = []

    def named(self, array: Array) -> str:
        """A name for an array; the same one for the same array."""
        for name, known in self._given.items():
            if known is array:
                return name
        name = f"w{len(self.weights)}"
        self._given[name] = array
        self.weights[name] = np.ascontiguousarray(array)
        return name

    def node(
        self, kind: str, inputs: list[str], *, domain: str = "", outputs: int = 1, **attributes: Any
    ) -> list[str]:
        """Add a node; the names of its outputs."""
        self._count += 1
        names = [f"v{self._count}.{number}" for number in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, domain=domain, **attributes))
        return names

    def linear(self, value: str, matrix: Matrix, bias: Array | None = None) -> str:
        """`value` times the transposed matrix, plus `bias`."""
        added = [] if bias is None else [self.named(bias)]
        if not isinstance(matrix, Packed):
            return self.node("Gemm", [value, self.named(matrix), *added], transB=1)[0]
        out, blocks = matrix.scales.shape
        inputs = [value, self.named(matrix.codes), self.named(matrix.scales)]
        (product,) = self.node(
            "MatMulNBits",
            inputs,
            domain=_MICROSOFT,
            K=blocks * BLOCK,
            N=out,
            bits=matrix.bits,
            block_size=BLOCK,
            accuracy_level=_INT8_ACTIVATIONS,
        )
        if matrix.rest is not None:
            rest = [self._block_sums(value, blocks), self.named(matrix.rest), product]
            (product,) = self.node("Gemm", rest, transB=1)
        return self.node("Add", [product, *added])[0] if added else product

    def _block_sums(self, value: str, blocks: int) -> str:
        if value not in self._sums:
            (cut,) = self.node("Reshape", [value, self.shape(-1, blocks, BLOCK)])
            (total,) = self.node("ReduceSum", [cut, self.shape(2)], keepdims=0)
            self._sums[value] = total
        return self._sums[value]

    def shape(self, *numbers: int) -> str:
        """A name for whole numbers, which have to be in the graph itself."""
        name = f"s{len(self.shapes)}"
        self.shapes.append(numpy_helper.from_array(np.array(numbers, np.int64), name))
        return name

    def model(self, vocabulary: int) -> bytes:
        """The graph as ONNX Runtime reads it."""
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "decoder",
            [
                value(TOKENS, TensorProto.INT64, ["token"]),
                value(WANTED, TensorProto.INT64, ["row"]),
            ],
            [value(LOGITS, TensorProto.FLOAT, ["row", vocabulary])],
            [*self.shapes, *(_external(name, array) for name, array in self.weights.items())],
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in _OPSETS.items()]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
        found: bytes = model.SerializeToString()
        return found


def _external(name: str, array: Array) -> TensorProto:
    """The statement that a weight is elsewhere."""
    tensor = TensorProto(name=name, data_type=_KINDS[str(array.dtype)], dims=array.shape)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="memory")
    return tensor


Attend = Callable[[Graph, str, int], str]
"""Makes what the heads of a layer give of its products, [token, (heads + 2 * kv_heads) * dim]."""


def paged(graph: Graph, products: str, layer: int) -> str:
    """Attention over the pool."""
    return graph.node(OPERATOR, [products], domain=DOMAIN, layer=layer)[0]


def build(weights: Weights, attend: Attend = paged) -> Graph:
    """The whole decoder."""
    spec, graph = weights.spec, Graph()
    epsilon = spec.norm_epsilon
    embedding = weights.table("token_embd.weight")
    (state,) = graph.node("Gather", [graph.named(embedding), TOKENS])
    gains = graph.named(weights.vector("blk.0.attn_norm.weight"))
    (normed,) = graph.node("SimplifiedLayerNormalization", [state, gains], axis=-1, epsilon=epsilon)

    def joined(change: str, name: str) -> None:
        nonlocal state, normed
        found = graph.node(
            "SkipSimplifiedLayerNormalization",
            [change, state, graph.named(weights.vector(name))],
            domain=_MICROSOFT,
            outputs=4,
            epsilon=epsilon,
        )
        normed, state = found[0], found[3]

    for layer in range(spec.layers):
        block = f"blk.{layer}"
        mixed = attend(graph, _products(graph, weights, normed, layer), layer)
        if layer == spec.layers - 1:
            (mixed,) = graph.node("Gather", [mixed, WANTED])
            (state,) = graph.node("Gather", [state, WANTED])
        bias = weights.vector(f"{block}.attn_output.bias") if spec.output_bias else None
        change = graph.linear(mixed, weights.matrix(f"{block}.attn_output.weight"), bias)
        joined(change, f"{block}.ffn_norm.weight")
        gate, up = (
            graph.linear(normed, weights.matrix(f"{block}.ffn_{it}.weight"))
            for it in ("gate", "up")
        )
        (gated,) = graph.node("QuickGelu", [gate], domain=_MICROSOFT, alpha=1.0)
        (gated,) = graph.node("Mul", [gated, up])
        last = layer == spec.layers - 1
        following = "output_norm.weight" if last else f"blk.{layer + 1}.attn_norm.weight"
        joined(graph.linear(gated, weights.matrix(f"{block}.ffn_down.weight")), following)
    head = weights.matrix("token_embd.weight" if spec.tied else "output.weight")
    tied = spec.tied and not isinstance(head, Packed)
    graph.linear(normed, embedding if tied else head)
    graph.nodes[-1].output[0] = LOGITS
    return graph


def _products(graph: Graph, weights: Weights, normed: str, layer: int) -> str:
    names = [f"blk.{layer}.attn_{part}" for part in "qkv"]
    matrices = weights.fused([f"{name}.weight" for name in names])
    biases: list[Array | None] = [None] * len(matrices)
    if weights.spec.qkv_bias:
        found = [weights.vector(f"{name}.bias") for name in names]
        biases = [*found] if len(matrices) > 1 else [np.concatenate(found)]
    products = [
        graph.linear(normed, matrix, bias) for matrix, bias in zip(matrices, biases, strict=True)
    ]
    return products[0] if len(products) == 1 else graph.node("Concat", products, axis=1)[0]
