"""The connector that vLLM loads: brings KV from the arena into vLLM's blocks, and takes it there.

Its scheduler's half (`get_num_new_matched_tokens` to `request_finished`) decides what moves in a
step, its worker's half moves it: imports before the forward pass, exports after each layer, or
after the last one where a device computes. A request says in its `kv_transfer_params` which job it
belongs to and which blocks of the arena are its own. Everything happens inside a step, so nothing
is under way between two of them, and an aborted request leaves nothing behind.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)

from backends.vllm.cells import Shape, coordinate, places
from backends.vllm.desk import TORCH_DTYPES, find

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

PROBED_BLOCK = 1
"""vLLM's block 0 is nobody's; the next one is used by nobody yet when caches are registered."""


@dataclass(slots=True)
class Errand:
    """What one request wants of the arena: its first `tokens` from there, or taken there.

    `blocks` are vLLM's, in order of position; `done` is how far it got, `had` how many tokens of
    the prefix vLLM had already.
    """

    job: str
    arena: tuple[int, ...] = ()
    tokens: int = 0
    imports: bool = False
    blocks: list[int] = field(default_factory=list)
    done: int = 0
    had: int = 0


@dataclass(slots=True, frozen=True)
class Move:
    """Some positions of one request, whole blocks of which are copied."""

    job: str
    start: int
    end: int
    engine: tuple[int, ...]
    arena: tuple[int, ...]


@dataclass
class Moves(KVConnectorMetadata):  # type: ignore[misc]
    """What the worker's half does in one step."""

    imports: list[Move] = field(default_factory=list)
    exports: list[Move] = field(default_factory=list)


class BatonConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """See the module."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._desk = find(extra["desk"])
        self._layout = self._desk.layout
        self._errands: dict[str, Errand] = {}
        self._layers: dict[str, int] = {}
        self._caches: list[torch.Tensor] = []

    # ---- the scheduler's half

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """How many tokens come from the arena beyond those that vLLM has, all at once."""
        errand = self._errand(request)
        if errand is None or not errand.imports or errand.done:
            return 0, False
        errand.had = min(num_computed_tokens, errand.tokens)
        return errand.tokens - errand.had, False

    def update_state_after_alloc(
        self, request: Request, blocks: Any, num_external_tokens: int
    ) -> None:
        """Nothing to do: `build_connector_meta` sees which blocks a request got."""

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Moves:
        """Decide what moves in this step."""
        moves = Moves()
        computed = self._note_blocks(scheduler_output)
        for name, scheduled in scheduler_output.num_scheduled_tokens.items():
            errand = self._errands.get(name)
            if errand is None:
                continue
            self._desk.told.pinned(errand.job, name, len(errand.blocks))
            if errand.imports and not errand.done:
                errand.done = errand.tokens
                moves.imports.append(self._move(errand, errand.had, errand.tokens))
            elif not errand.imports:
                end = min(errand.tokens, computed[name] + scheduled)
                if end > errand.done:
                    moves.exports.append(self._move(errand, errand.done, end))
                    errand.done = end
        return moves

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, None]:
        """Its blocks are free as soon as this returns: nothing of it is under way."""
        errand = self._errands.pop(request.request_id, None)
        if errand is not None:
            self._desk.told.pinned(errand.job, request.request_id, 0)
        return False, None

    def _errand(self, request: Request) -> Errand | None:
        name = request.request_id
        wanted = request.kv_transfer_params
        if name not in self._errands and wanted is not None:
            self._errands[name] = Errand(**wanted)
        return self._errands.get(name)

    def _note_blocks(self, output: SchedulerOutput) -> dict[str, int]:
        """Follow each request's blocks; how many of its tokens have their KV before this step."""
        computed = {}
        for name in output.preempted_req_ids or ():
            if name in self._errands:
                self._errands[name].blocks = []
                self._desk.told.pinned(self._errands[name].job, name, 0)
        for new in output.scheduled_new_reqs:
            computed[new.req_id] = new.num_computed_tokens
            if new.req_id in self._errands:
                self._errands[new.req_id].blocks = list(new.block_ids[0])
        cached = output.scheduled_cached_reqs
        for number, name in enumerate(cached.req_ids):
            computed[name] = cached.num_computed_tokens[number]
            errand, blocks = self._errands.get(name), cached.new_block_ids[number]
            if errand is None or blocks is None:
                continue
            if name in cached.resumed_req_ids:
                errand.blocks = list(blocks[0])
            else:
                errand.blocks += blocks[0]
        return computed

    def _move(self, errand: Errand, start: int, end: int) -> Move:
        size = self._layout.block_tokens
        reached = slice(start // size, -(-end // size))
        engine, arena = tuple(errand.blocks[reached]), tuple(errand.arena[reached])
        return Move(errand.job, start, end, engine, arena)

    # ---- the worker's half

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """See how the kernel keeps a block, and refuse what the layout does not describe.

        Raises:
            ValueError: says what differs.
        """
        layout = self._layout
        names = sorted(kv_caches, key=_layer_number)
        if [_layer_number(name) for name in names] != list(range(layout.layers)):
            raise ValueError(f"vLLM registers layers {names[:3]}..., not {layout.layers} of them")
        shape = Shape(layout.planes, layout.kv_heads, layout.block_tokens, layout.head_dim)
        looks = (layout.kv_heads, layout.block_tokens, layout.planes * layout.head_dim)
        for name in names:
            cache = kv_caches[name]
            if tuple(cache.shape[1:]) != looks or cache.dtype != TORCH_DTYPES[layout.dtype]:
                raise ValueError(
                    f"{name} has blocks of {tuple(cache.shape[1:])} {cache.dtype};"
                    f" its configuration says {looks} {layout.dtype}"
                )
        self._layers = {name: number for number, name in enumerate(names)}
        self._caches = [kv_caches[name] for name in names]
        layer = self._vllm_config.compilation_config.static_forward_context[names[0]]
        found = places(shape, _watch(layer, self._caches[0], shape))
        device = self._caches[0].device
        back = np.empty_like(found)
        back[found] = np.arange(len(found))
        self._out = torch.from_numpy(found).to(device)
        self._in = torch.from_numpy(back).to(device)
        self._at_each_layer = device.type == "cpu"

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Bring in what this step's requests compute upon, all layers of it."""
        for move in self._moves().imports:
            for layer in range(len(self._caches)):
                self._bring(layer, move)
            self._desk.told.imported(move.job)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: everything is there before the forward pass begins."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Take a layer of what this step computes to the arena, where the CPU computed it."""
        if self._at_each_layer and layer_name in self._layers:
            layer = self._layers[layer_name]
            for move in self._moves().exports:
                self._take(layer, move)
                self._desk.told.exported(move.job, move.start, move.end, layer)

    def wait_for_save(self) -> None:
        """Take all layers to the arena, where another device computed them."""
        if self._at_each_layer:
            return
        for move in self._moves().exports:
            for layer in range(len(self._caches)):
                self._take(layer, move)
            self._desk.told.exported(move.job, move.start, move.end, None)

    def _moves(self) -> Moves:
        moves = self._get_connector_metadata()
        assert isinstance(moves, Moves)
        return moves

    def _bring(self, layer: int, move: Move) -> None:
        cache = self._caches[layer]
        blocks = self._desk.arena[layer, list(move.arena)]
        tail = move.end % self._layout.block_tokens
        if tail:  # whatever lies behind the prefix must be numbers: the kernel multiplies them by 0
            last = blocks[-1].view(-1, self._layout.block_tokens, self._layout.head_dim)
            last[:, tail:] = 0
        kept = blocks.to(cache.device).index_select(1, self._in)
        cache[list(move.engine)] = kept.view(-1, *cache.shape[1:])

    def _take(self, layer: int, move: Move) -> None:
        cache = self._caches[layer]
        kept = cache[list(move.engine)].reshape(len(move.engine), -1)
        self._desk.arena[layer, list(move.arena)] = kept.index_select(1, self._out).cpu()


def _layer_number(name: str) -> int:
    """Of "model.layers.7.self_attn.attn", 7."""
    numbers = [part for part in name.split(".") if part.isdecimal()]
    if len(numbers) != 1:
        raise ValueError(f"the layer {name!r} does not say which one it is")
    return int(numbers[0])


def _watch(layer: Any, cache: torch.Tensor, shape: Shape) -> dict[str, np.ndarray[Any, Any]]:
    """What a block of `cache` holds after the layer's kernel wrote known numbers into it."""
    update = getattr(layer.impl, "do_kv_cache_update", None)
    if update is None:
        raise ValueError(f"{type(layer.impl).__name__} does not write KV by a call of its own")
    first = PROBED_BLOCK * shape.tokens
    slots = torch.arange(first, first + shape.tokens, device=cache.device)
    seen = {}
    for axis in Shape._fields:
        numbers = torch.from_numpy(np.ascontiguousarray(coordinate(shape, axis)))
        told = numbers.to(cache.device, cache.dtype).transpose(1, 2).contiguous()
        cache[PROBED_BLOCK] = -1
        update(layer, told[0], told[-1], cache, slots)
        seen[axis] = cache[PROBED_BLOCK].reshape(-1).double().cpu().numpy()
    cache[PROBED_BLOCK] = 0
    return seen
