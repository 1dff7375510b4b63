"""Copy KV between a device's pool and its copy in host memory while the device computes on.

What leaves is gathered on the device, copied into page-locked memory on a stream of its own, and
put in its place by the CPU once that copy has ended; what comes takes the same road backwards.
On the CPU the same steps happen at once, which is how they are tested.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import msgspec
import torch

MOST_UNDER_WAY = 4
"""Copies that may be under way: as many layers as hide one copy, and a bound on pinned memory."""


class _Copy(msgspec.Struct, frozen=True, eq=False):
    """Some layers of some blocks on their way to the host; `done` is None where they are there."""

    layers: slice
    blocks: torch.Tensor
    staged: torch.Tensor
    done: torch.cuda.Event | None
    landed: Callable[[], None]


class Staging:
    """Keeps `host` and `device` in step: the same pool, both as [layer, K|V, block, ...]."""

    def __init__(self, device: torch.Tensor, host: torch.Tensor) -> None:
        self._device = device
        self._host = host
        self._stream: torch.cuda.Stream | None = None
        if device.is_cuda:
            self._stream = torch.cuda.Stream(device.device)  # type: ignore[no-untyped-call]
        self._under_way: deque[_Copy] = deque()

    def send(self, layers: slice, blocks: torch.Tensor, landed: Callable[[], None]) -> None:
        """Copy these layers of `blocks` to the host; `landed` is called when they are there.

        That is in this call or in a later `collect`, in the order of the calls. What is written
        to the device's blocks afterwards is not what travels: they have been gathered.
        """
        gathered = self._device[layers, :, blocks.to(self._device.device)]
        staged, done = gathered, None
        if self._stream is not None:
            staged = torch.empty(gathered.shape, dtype=gathered.dtype, pin_memory=True)
            self._stream.wait_stream(torch.cuda.current_stream(gathered.device))
            with torch.cuda.stream(self._stream):
                staged.copy_(gathered, non_blocking=True)
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record(self._stream)
            gathered.record_stream(self._stream)
        self._under_way.append(_Copy(layers, blocks.cpu(), staged, done, landed))
        self.collect(leave=MOST_UNDER_WAY)

    def collect(self, *, leave: int) -> None:
        """Put what has arrived in its place; wait until at most `leave` copies are under way."""
        while self._under_way:
            first = self._under_way[0]
            over = first.done is None or first.done.query()  # type: ignore[no-untyped-call]
            if first.done is not None and not over:
                if len(self._under_way) <= leave:
                    return
                first.done.synchronize()
            self._under_way.popleft()
            self._host[first.layers, :, first.blocks] = first.staged
            first.landed()

    def abandon(self) -> None:
        """Forget what is under way, and tell nobody of it."""
        self._under_way.clear()

    def fetch(self, blocks: torch.Tensor) -> None:
        """Copy all layers of `blocks` from the host to the device.

        Returns when the host's memory may be written again; whatever the device does next sees
        the blocks.
        """
        index = blocks.to(self._device.device)
        for layer, part in enumerate(self._host):
            staged = part.new_empty(
                (part.shape[0], len(blocks), *part.shape[2:]), pin_memory=self._stream is not None
            )
            torch.index_select(part, 1, blocks, out=staged)
            self._device[layer, :, index] = self._to_device(staged)

    def _to_device(self, staged: torch.Tensor) -> torch.Tensor:
        """`staged` as the current stream will see it, copied while that does something else."""
        if self._stream is None:
            return staged
        with torch.cuda.stream(self._stream):
            arrived = staged.to(self._device.device, non_blocking=True)
        current = torch.cuda.current_stream(self._device.device)
        current.wait_stream(self._stream)
        arrived.record_stream(current)
        return arrived
