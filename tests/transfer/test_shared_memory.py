import contextlib
import fcntl
import gc
import os
import resource
import socket
import subprocess
import sys
import tempfile

import numpy as np
import pytest

from transfer.shared_memory import SEALS, Segment, allocate, attach, segment_of

PAGE = 4096


def faults():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_minflt + used.ru_majflt


def test_a_pool_is_zeroed_aligned_and_touched():
    memory = allocate(64 << 20)
    made = faults()
    memory[::PAGE] = 1
    assert memory.ctypes.data % PAGE == 0
    assert memory.sum() == memory.size // PAGE
    assert faults() - made < 100 < memory.size // PAGE


def test_what_one_mapping_writes_the_other_reads():
    ours = allocate(3 * PAGE)
    theirs = attach(segment_of(ours))
    theirs[PAGE + 7] = 42
    assert ours[PAGE + 7] == 42
    part = attach(segment_of(ours[PAGE + 7 : PAGE + 9]))
    assert part.tolist() == [42, 0]


def test_a_file_whose_memory_is_not_there_is_not_mapped():
    """To touch it would take as much memory as its length claims, from whoever maps it."""
    with open(os.memfd_create("claim", os.MFD_ALLOW_SEALING), "rb+") as file:
        os.ftruncate(file.fileno(), 64 * PAGE)
        fcntl.fcntl(file.fileno(), fcntl.F_ADD_SEALS, SEALS)
        with pytest.raises(ValueError, match="holes"):
            attach(Segment(file.fileno(), 0, PAGE))
        os.posix_fallocate(file.fileno(), 0, 64 * PAGE)
        assert len(attach(Segment(file.fileno(), 0, PAGE))) == PAGE


def test_a_mapping_outlives_the_memory_that_was_allocated():
    ours = allocate(PAGE)
    ours[:] = 5
    theirs = attach(segment_of(ours))
    del ours
    gc.collect()
    assert (theirs == 5).all()


def test_memory_that_was_given_back_is_no_segment_and_keeps_no_file():
    files = len(os.listdir("/proc/self/fd"))
    memory = allocate(PAGE)
    view = memory[10:20]
    segment = segment_of(view)
    assert segment.offset == 10
    del memory
    assert segment_of(view) == segment
    del view
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(segment.fd)
    assert len(os.listdir("/proc/self/fd")) == files


def test_other_memory_is_no_segment():
    memory = allocate(PAGE)
    assert segment_of(np.zeros(PAGE, np.uint8)) is None
    beyond = np.lib.stride_tricks.as_strided(memory, (PAGE + 1,))
    assert segment_of(beyond) is None


def test_nobody_can_make_a_pool_shorter():
    segment = segment_of(allocated := allocate(PAGE))
    with pytest.raises(PermissionError):
        os.ftruncate(segment.fd, 0)
    with pytest.raises(PermissionError):
        os.ftruncate(segment.fd, 2 * PAGE)
    assert allocated.size == PAGE


def test_a_file_that_could_be_made_shorter_is_not_mapped():
    fd = os.memfd_create("loose")
    os.ftruncate(fd, PAGE)
    with contextlib.closing(os.fdopen(fd, "rb")), pytest.raises(ValueError, match="shorter"):
        attach(Segment(fd, 0, PAGE))
    with tempfile.TemporaryFile() as file, pytest.raises(ValueError, match="shorter"):
        attach(Segment(file.fileno(), 0, PAGE))
    ours, _theirs = socket.socketpair()
    with ours, _theirs, pytest.raises(ValueError, match="shorter"):
        attach(Segment(ours.fileno(), 0, PAGE))


@pytest.mark.parametrize(("offset", "size"), [(0, PAGE + 1), (PAGE, 1), (-1, 2), (0, 0), (1, PAGE)])
def test_a_segment_beyond_its_file_is_not_mapped(offset, size):
    memory = allocate(PAGE)
    with pytest.raises(ValueError, match="not within"):
        attach(Segment(segment_of(memory).fd, offset, size))


@pytest.mark.parametrize("size", [0, -1])
def test_nothing_cannot_be_allocated(size):
    with pytest.raises(ValueError, match="size"):
        allocate(size)


def test_too_much_is_an_error_and_not_a_dead_process():
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
from transfer.shared_memory import allocate
try:
    allocate(1 << 21)
except OSError as error:
    print("refused")
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert told.stdout == "refused\n", told.stderr
