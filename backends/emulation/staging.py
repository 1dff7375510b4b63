"""Copy KV between a device's pool and its copy in host memory while the device computes on.

The host's memory is page-locked and mapped, so that the device itself puts each block where it
belongs, on a stream of its own. On the CPU the same steps happen at once, which is how they are
tested without a device.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable

import msgspec
import torch

from backends.errors import BackendMisconfigured


class _Copy(msgspec.Struct, frozen=True, eq=False):
    """A copy on its way to the host; `done` is None where it is there."""

    done: torch.cuda.Event | None
    landed: Callable[[], None]


class Staging:
    """Keeps `host` and `device` in step: the same pool, both as [layer, K|V, block, ...].

    Raises:
        BackendMisconfigured: the device cannot address the host's memory.
    """

    def __init__(self, device: torch.Tensor, host: torch.Tensor) -> None:
        self._stream: torch.cuda.Stream | None = None
        seen = host
        if device.is_cuda:
            self._stream = torch.cuda.Stream(device.device)  # type: ignore[no-untyped-call]
            seen = _mapped(host, device.device)
            weakref.finalize(self, _unmap, host)
        self._device, self._host = _wide(device), _wide(seen)
        self._under_way: deque[_Copy] = deque()

    def send(self, layers: slice, blocks: torch.Tensor, landed: Callable[[], None]) -> None:
        """Copy these layers of `blocks` to the host; `landed` is called when they are there.

        That is in this call or in a later `collect`, in the order of the calls. The device must
        not write to them until then.
        """
        index = blocks.to(self._device.device)
        done = None
        if self._stream is None:
            self._host[layers, :, index] = self._device[layers, :, index]
        else:
            self._stream.wait_stream(torch.cuda.current_stream(index.device))
            with torch.cuda.stream(self._stream):
                self._host[layers, :, index] = self._device[layers, :, index]
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record(self._stream)
            index.record_stream(self._stream)
        self._under_way.append(_Copy(done, landed))
        self.collect(wait=False)

    def collect(self, *, wait: bool) -> None:
        """Tell of what has arrived; with `wait`, of all that is under way."""
        while self._under_way:
            done = self._under_way[0].done
            if done is not None and not done.query():  # type: ignore[no-untyped-call]
                if not wait:
                    return
                done.synchronize()
            self._under_way.popleft().landed()

    def abandon(self) -> None:
        """Forget what is under way, and tell nobody of it. Nothing is written afterwards."""
        self._under_way.clear()
        if self._stream is not None:
            with contextlib.suppress(RuntimeError):  # a lost device writes nothing either
                self._stream.synchronize()

    def fetch(self, blocks: torch.Tensor) -> None:
        """Copy all layers of `blocks` from the host to the device.

        Returns when the host's memory may be written again.
        """
        index = blocks.to(self._device.device)
        self._device[:, :, index] = self._host[:, :, index]
        if self._stream is not None:
            torch.cuda.current_stream(index.device).synchronize()


class _Memory:
    """Memory that the device can address, as torch takes it in."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _mapped(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The memory of `host`, locked, as a tensor of the same shape that `device` can address."""
    memory = host.untyped_storage()
    mapped = 2  # cudaHostRegisterMapped; addresses are the same on both sides
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    failure = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes(), mapped))
    if failure:
        raise BackendMisconfigured(
            f"device: {memory.nbytes()} bytes of host memory cannot be locked for the GPU"
            f" (CUDA error {failure}); a smaller pool may fit"
        )
    flat = torch.as_tensor(_Memory(memory.data_ptr(), memory.nbytes()), device=device)
    return flat.view(host.dtype).as_strided(host.shape, host.stride(), host.storage_offset())


def _unmap(host: torch.Tensor) -> None:
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostUnregister(host.untyped_storage().data_ptr())


def _wide(pool: torch.Tensor) -> torch.Tensor:
    """The same pool in fewer, larger numbers, where a row of it is whole numbers of those."""
    whole = pool.shape[-1] * pool.element_size() % 8 == 0
    return pool.view(torch.int64) if whole and pool.element_size() < 8 else pool
