"""How main describes a pool to a connector."""

from dataclasses import dataclass

import torch

from tensorrt_llm.standin.flavour import since

if not since("main"):
    raise ModuleNotFoundError(f"No module named {__name__!r}", name=__name__)

BAD_PAGE_INDEX = -1


@dataclass(frozen=True)
class KvCacheBufferRef:
    layer_id: int
    role: str
    expansion: int = 1


@dataclass(frozen=True)
class KvCacheRegion:
    base: int
    size: int
    stride: int
    num_slots: int
    buffers: tuple[KvCacheBufferRef, ...]


@dataclass(frozen=True)
class KvCacheLayerGroupLayout:
    layer_group_id: int
    layer_ids: tuple[int, ...]
    window_size: int | None
    regions: tuple[KvCacheRegion, ...]


@dataclass(frozen=True)
class KvCacheLayout:
    tokens_per_block: int
    dtype: torch.dtype
    groups: tuple[KvCacheLayerGroupLayout, ...]
    tensor: torch.Tensor | None = None

    def group(self, layer_group_id):
        return next(it for it in self.groups if it.layer_group_id == layer_group_id)

    def group_of_layer(self, layer_id):
        return next(it for it in self.groups if layer_id in it.layer_ids)

    def as_single_pool_tensor(self):
        return self.tensor


def valid_page_slots(slots):
    return [slot for slot in slots if slot != BAD_PAGE_INDEX]
