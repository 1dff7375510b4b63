"""One NIXL agent: its registered memory, the peers it may write to, and the writes under way.

NIXL's agent is used by one thread at a time, under a lock. Its own progress thread burns a core;
here a thread looks after the agent while something is under way, with growing pauses, and sleeps
otherwise. What was registered stays registered, and allocated, for the life of the process: a
peer may write to it after it was deregistered, and crashes us where it is unmapped.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import threading
import time
import uuid
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transfer.nixl import settings
from transfer.shared_memory import allocate

MODULES = ("nixl_cu12", "nixl_cu13", "nixl")

SHORTEST_PAUSE_SECONDS = 50e-6
LONGEST_PAUSE_SECONDS = 1e-3
"""Between two looks at the agent; doubled from the one to the other while nothing happens."""

IDLE_PAUSE_SECONDS = 0.25
"""The same while nothing is under way: UCX answers its peers' questions and closes connections."""

QUICK_SECONDS = 100e-6
"""A look that takes longer has moved something: one that finds nothing takes 10 to 75 us."""

Addresses = NDArray[np.int64]


def available() -> bool:
    """Whether a build of NIXL is installed."""
    return any(importlib.util.find_spec(it) for it in MODULES)


def has_verbs() -> bool:
    """Whether it is, and this machine has a device for RDMA."""
    return available() and any(Path("/sys/class/infiniband").glob("*"))


def require() -> None:
    """Refuse to go on without NIXL.

    Raises:
        ImportError: it is not installed.
    """
    if not available():
        raise ImportError("NIXL is not installed: pip install --no-deps nixl-cu12")


class Transfer:
    """Writes that were posted together. Done when all of them have landed, or failed."""

    def __init__(self, handle: Any, state: str) -> None:
        """Take note; `Agent.write` is the way in."""
        self.handle = handle
        self.ended = threading.Event()
        self.error: OSError | None = None
        self.hear(state)

    def hear(self, state: str) -> None:
        """Take note of what NIXL said of it last."""
        if state == "ERR":
            self.error = ConnectionError("a write failed")
        if state != "PROC":
            self.ended.set()


class Windows:
    """Pieces of registered memory that are lent: all of one size, and never given back to others.

    What was not returned, because something may still be written to it, is not lent again.
    """

    def __init__(self, agent: Agent, size: int) -> None:
        """Begin with none."""
        self._agent = agent
        self._size = size
        self._free: list[NDArray[np.uint8]] = []

    def take(self) -> NDArray[np.uint8]:
        """Borrow one; any thread.

        Raises:
            OSError: there is not so much memory, or it cannot be registered.
        """
        try:
            return self._free.pop()
        except IndexError:
            window = allocate(self._size)
            self._agent.register(window)
            return window

    def give(self, window: NDArray[np.uint8]) -> None:
        """Return one that nothing is written to any more; any thread."""
        self._free.append(window)


class Agent:
    """An agent of this process. Methods block unless they say otherwise; any thread may call."""

    def __init__(self) -> None:
        """Make the agent; takes some tenths of a second the first time.

        Raises:
            ImportError: NIXL is not installed.
            OSError: it cannot be loaded, or UCX finds nothing to work with.
        """
        require()
        settings.apply()
        with _failures("NIXL"):
            self._library = _library()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._memory: dict[tuple[int, int], NDArray[np.uint8]] = {}
        self._transfers: set[Transfer] = set()
        self._peers: Counter[str] = Counter()
        self._visitors: set[object] = set()
        self._closed = False
        self._ending = False
        self._agent = self._make()
        self._thread = threading.Thread(target=self._look_after, name="kv-nixl", daemon=True)
        self._thread.start()
        _agents.add(self)

    def register(self, memory: NDArray[np.uint8]) -> int:
        """Let peers, and writes of ours, reach `memory`; for ever, however often this is called.

        Returns how many pieces were registered up to this one.

        Raises:
            OSError: it cannot be registered.
        """
        key = (memory.ctypes.data, memory.nbytes)
        with self._lock:
            if key not in self._memory:
                self._register(*key)
                self._memory[key] = memory
            return list(self._memory).index(key) + 1

    def metadata(self) -> tuple[int, bytes]:
        """What a peer must know to write here, and to how many pieces of memory it can then."""
        with self._lock:
            return len(self._memory), self._agent.get_agent_metadata()

    # ---- as a sender ------------------------------------------------------------------------

    def meet(self, metadata: bytes) -> str:
        """Know a peer. Returns its name; `leave` it as often as it was met.

        Raises:
            OSError: the metadata makes no sense, or there is no way to the peer.
        """
        with self._lock, _failures("a peer's metadata"):
            name = self._agent.add_remote_agent(metadata)
            name = name.decode() if isinstance(name, bytes) else str(name)
            self._peers[name] += 1
            return name

    def learn(self, metadata: bytes) -> None:
        """Know more of a peer that was met; raises as `meet`."""
        with self._lock, _failures("a peer's metadata"):
            self._agent.add_remote_agent(metadata)

    def leave(self, name: str) -> None:
        """Need a peer no more."""
        with self._lock:
            self._peers[name] -= 1
            if self._peers[name] <= 0:
                del self._peers[name]
                with contextlib.suppress(OSError), _failures(name):
                    self._agent.remove_remote_agent(name)

    def write(self, peer: str, here: Addresses, there: Addresses, lengths: Addresses) -> Transfer:
        """Post writes of `lengths` bytes from the addresses `here` to those `there`.

        Raises:
            OSError: the peer is lost, or does not have such memory.
        """
        with self._lock, _failures(f"a write to {peer}"):
            agent = self._agent
            local = agent.get_xfer_descs(_descriptors(here, lengths), "DRAM")
            remote = agent.get_xfer_descs(_descriptors(there, lengths), "DRAM")
            handle = agent.initialize_xfer("WRITE", local, remote, peer)
            transfer = Transfer(handle, agent.transfer(handle))
            if transfer.ended.is_set():
                handle.release()
            else:
                self._transfers.add(transfer)
                self._wake.set()
            return transfer

    # ---- as a receiver ----------------------------------------------------------------------

    def expect(self, visitor: object) -> None:
        """Somebody may write here now: look often until `relax` was called. Never blocks."""
        self._visitors.add(visitor)
        self._wake.set()

    def relax(self, visitor: object) -> None:
        """The opposite of `expect`; safe to call twice. Never blocks."""
        self._visitors.discard(visitor)

    def renew(self) -> None:
        """Cut every connection of every peer, so that no write of theirs can land any more.

        The agent is made anew with all its memory; who knew the old one must meet the new one.

        Raises:
            OSError: it cannot be made.
        """
        with self._lock:
            self._transfers.clear()
            self._peers.clear()
            self._agent = _Gone()  # the destructor closes what the old one had
            self._agent = self._make()
            for address, size in self._memory:
                self._register(address, size)

    def close(self) -> None:
        """Look after it no more, and let go of it once no write of ours is under way."""
        self._closed = True
        self._wake.set()

    def end(self) -> None:
        """The process ends: a thread that is in NIXL's code then would abort it."""
        self._ending = True
        self._wake.set()
        self._thread.join(IDLE_PAUSE_SECONDS)

    # ---- the agent itself -------------------------------------------------------------------

    def _make(self) -> Any:
        with _failures("an agent"):
            config = self._library.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
            return self._library.nixl_agent(uuid.uuid4().hex, config)

    def _register(self, address: int, size: int) -> None:
        with _failures(f"{size} bytes of memory"):
            self._agent.register_memory([(address, size, 0, "")], "DRAM")

    def _look_after(self) -> None:
        pause = SHORTEST_PAUSE_SECONDS
        while True:
            self._wake.clear()
            if self._closed and not self._transfers:
                break
            if self._ending:
                return
            if not self._transfers and not self._visitors:
                self._wake.wait(IDLE_PAUSE_SECONDS)
                pause = SHORTEST_PAUSE_SECONDS
            with self._lock:
                moved = self._look()
            pause = SHORTEST_PAUSE_SECONDS if moved else min(2 * pause, LONGEST_PAUSE_SECONDS)
            time.sleep(pause)
        with self._lock:
            self._agent = _Gone()

    def _look(self) -> bool:
        """Move things on. Whether anything has happened."""
        begun, before = time.monotonic(), len(self._transfers)
        with contextlib.suppress(OSError), _failures("an agent"):
            self._agent.get_new_notifs()
        for transfer in list(self._transfers):
            try:
                with _failures("a write"):
                    transfer.hear(self._agent.check_xfer_state(transfer.handle))
            except OSError as error:
                transfer.error = error
                transfer.ended.set()
            if transfer.ended.is_set():
                self._transfers.discard(transfer)
                with contextlib.suppress(OSError), _failures("a write"):
                    transfer.handle.release()
        return len(self._transfers) < before or time.monotonic() - begun > QUICK_SECONDS


class _Gone:
    """In place of an agent that was let go of, or could not be made anew."""

    def __getattr__(self, name: str) -> Any:
        raise ConnectionError("the agent is gone")


_agents: weakref.WeakSet[Agent] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    for agent in list(_agents):
        agent.end()


def _descriptors(addresses: Addresses, lengths: Addresses) -> NDArray[np.uint64]:
    table = np.zeros((len(addresses), 3), dtype=np.uint64)
    table[:, 0] = addresses
    table[:, 1] = lengths
    return table


def _library() -> Any:
    return importlib.import_module(next(it for it in MODULES if importlib.util.find_spec(it)))


@contextlib.contextmanager
def _failures(what: str) -> Iterator[None]:
    """NIXL's errors are of classes of its own without a public base, and of many of Python's."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ConnectionError(f"{what}: {error or type(error).__name__}") from error
