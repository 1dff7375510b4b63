"""Memory for a pool that another process on this machine can map: a sealed memfd, touched once.

`allocate` is how a backend gets its pool; `segment_of` says which file a piece of memory belongs
to, if it came from here; `attach` maps somebody else's. Knows neither blocks nor layouts.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import weakref

import msgspec
import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

POPULATE_WRITE = 23
"""For `madvise`: map every page now, for writing. Linux has it from 5.14 on."""

STAT_BLOCK_BYTES = 512
"""The unit of `st_blocks`, whatever the file system's own is."""

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Segment(msgspec.Struct, frozen=True):
    """A piece of a shared file: `size` bytes from `offset` on."""

    fd: int
    offset: int
    size: int


_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

# Every mapping made by `allocate` that is still in use: its first address, its length, its file.
_mappings: dict[int, tuple[int, int]] = {}


def allocate(size: int) -> Bytes:
    """`size` zeroed bytes whose pages are all there, aligned to a page, writable, shareable.

    The memory lasts as long as the array or a view of it. Others who map its file can write to
    it, but nobody can make it shorter, so that no mapping of it ever faults.

    Raises:
        ValueError: `size` is not positive.
        OSError: there is not so much memory.
    """
    if size <= 0:
        raise ValueError(f"size: {size} bytes cannot be allocated")
    fd = os.memfd_create("baton-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        # Unlike a first touch that finds no memory, which kills the process, this fails.
        os.posix_fallocate(fd, 0, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        mapping = mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
    except BaseException:
        os.close(fd)
        raise
    memory = np.frombuffer(mapping, dtype=np.uint8)
    _touch(memory)
    address = memory.ctypes.data
    _mappings[address] = (size, fd)
    weakref.finalize(mapping, _forget, address, fd).atexit = False
    return memory


def segment_of(memory: Bytes) -> Segment | None:
    """Where `memory`, a contiguous array, lies in a file that `allocate` made; None elsewhere."""
    first = memory.ctypes.data
    for address, (size, fd) in _mappings.items():
        if address <= first and first + memory.nbytes <= address + size:
            return Segment(fd, first - address, memory.nbytes)
    return None


def attach(segment: Segment) -> Bytes:
    """Map a segment of somebody else's file, every page of it. Its descriptor may be closed then.

    Raises:
        ValueError: it is no file whose length is sealed, the segment reaches beyond it, or the file
            is longer than the memory that was taken for it.
        OSError: it cannot be mapped.
    """
    if not _is_sealed(segment.fd):
        raise ValueError("the file could be made shorter while it is written to")
    status = os.fstat(segment.fd)
    size = status.st_size
    if not 0 <= segment.offset < segment.offset + segment.size <= size:
        raise ValueError(f"{segment.size} bytes at {segment.offset} are not within {size}")
    if status.st_blocks * STAT_BLOCK_BYTES < size:
        raise ValueError(f"the file has holes, for which whoever maps it would pay ({size} bytes)")
    page = segment.offset % mmap.ALLOCATIONGRANULARITY
    mapping = mmap.mmap(
        segment.fd,
        page + segment.size,
        flags=mmap.MAP_SHARED,
        offset=segment.offset - page,
    )
    memory = np.frombuffer(mapping, dtype=np.uint8)
    _touch(memory)
    return memory[page:]


def _touch(memory: Bytes) -> None:
    """Map every page, without the interpreter's lock: it takes a while.

    Where the kernel cannot, they are mapped one by one as they are used.
    """
    _libc.madvise(memory.ctypes.data, memory.nbytes, POPULATE_WRITE)


def _is_sealed(fd: int) -> bool:
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:  # not a file in memory
        return False


def _forget(address: int, fd: int) -> None:
    _mappings.pop(address, None)
    os.close(fd)
