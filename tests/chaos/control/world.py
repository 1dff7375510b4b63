"""Several processes under one virtual clock: each an event loop of its own, on one thread.

A process that is stopped runs nothing until it goes on, and one that has crashed never runs again:
no `finally` of it, no timer. Time jumps to the next timer as soon as nobody has anything to do.
Every process has a monotonic clock with a beginning of its own.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from typing import Any

from tests.chaos.clock import Stuck

DRAIN_LIMIT = 20_000
MOST_AT_ONCE = 100_000


class Turn:
    """A callback that waits for its turn: asyncio's handle, without its checks and messages."""

    __slots__ = ("act", "arguments", "context", "loop")

    def __init__(
        self,
        loop: ProcessLoop,
        act: Callable[..., Any],
        arguments: tuple[Any, ...],
        context: Context | None,
    ) -> None:
        self.loop = loop
        self.act: Callable[..., Any] | None = act
        self.arguments = arguments
        self.context = context or copy_context()

    def cancel(self) -> None:
        """As asyncio's."""
        self.act, self.arguments = None, ()

    def take(self) -> None:
        """Call it, unless it was cancelled. What it raises is a finding."""
        if self.act is None:
            return
        try:
            self.context.run(self.act, *self.arguments)
        except (Exception, asyncio.CancelledError) as error:
            self.loop.complain(f"exception in {self.act}: {error!r}")


Timer = tuple[float, int, Turn]


class World:
    """Time, and the order in which things happen."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ready: deque[Turn] = deque()
        self.timers: list[Timer] = []
        self.numbers = itertools.count()
        self.over = False

    def at(self, loop: ProcessLoop, when: float, act: Callable[..., Any], *arguments: Any) -> None:
        """Have `act` called in that process, at world time `when`."""
        heapq.heappush(self.timers, (when, next(self.numbers), Turn(loop, act, arguments, None)))

    def run(self) -> None:
        """Go on until `over` is set.

        Raises:
            Stuck: nothing will happen any more, or nothing but the same at one time.
        """
        ready, timers = self.ready, self.timers
        current: ProcessLoop | None = None
        at_once = 0
        try:
            while not self.over:
                if ready:
                    turn = ready.popleft()
                elif timers:
                    before = self.now
                    self.now, _, turn = heapq.heappop(timers)
                    at_once = 0 if self.now > before else at_once + 1
                    if at_once > MOST_AT_ONCE:
                        raise Stuck("the time stands still")
                else:
                    raise Stuck("nothing more will happen")
                loop = turn.loop
                if loop.queue is not ready:  # stopped or dead
                    loop.queue.append(turn)
                    continue
                if loop is not current:
                    events._set_running_loop(loop)
                    current = loop
                turn.take()
        finally:
            events._set_running_loop(None)


class ProcessLoop(asyncio.AbstractEventLoop):
    """The event loop of one process. `queue` takes what is to run next."""

    def __init__(self, world: World, name: str, *, begins: float = 0.0) -> None:
        self.world = world
        self.name = name
        self.queue: deque[Turn] = world.ready
        self.dead = False
        self.complain: Callable[[str], None] = lambda complaint: None
        self._tasks: list[asyncio.Task[Any]] = []
        self.sockets: Any = None
        self.step_seconds: Callable[[], float] = lambda: 0.0
        self._shift = begins
        self._timers = world.timers
        self._epoch = 0

    # ---- what the world does to it

    def stop(self, seconds: float) -> None:
        """Run nothing for a while (SIGSTOP, then SIGCONT)."""
        if self.dead:
            return
        if self.queue is self.world.ready:
            self.queue = deque()
        self._epoch += 1
        keeper = ProcessLoop(self.world, "SIGCONT")
        self.world.at(keeper, self.world.now + seconds, self._go_on, self._epoch)

    def _go_on(self, epoch: int) -> None:
        if not self.dead and epoch == self._epoch:
            kept, self.queue = self.queue, self.world.ready
            self.world.ready.extend(kept)

    @property
    def stopped(self) -> bool:
        """Whether it stands still for the time being."""
        return not self.dead and self.queue is not self.world.ready

    def die(self) -> None:
        """Never run again (SIGKILL)."""
        self.dead = True
        if self.queue is self.world.ready:
            self.queue = deque()

    def dispose(self) -> list[str]:
        """Cancel whatever is left and let it unwind, at no time. Returns who would not end."""
        kept = deque(it for it in self.world.ready if it.loop is self)
        if self.queue is not self.world.ready:
            kept.extend(self.queue)
        self.queue, self._timers = kept, []
        for task in self.tasks:
            task.cancel()
        events._set_running_loop(self)
        try:
            for _ in range(DRAIN_LIMIT):
                if self.queue:
                    turn = self.queue.popleft()
                elif self._timers and self.tasks:
                    when, _, turn = heapq.heappop(self._timers)
                    self._shift += max(0.0, when - self.world.now - self._shift)
                else:
                    break
                turn.take()
        finally:
            events._set_running_loop(None)
        left = self.tasks
        for task in left:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        return [str(task.get_coro()) for task in left]

    # ---- what asyncio asks of a loop

    def time(self) -> float:
        """This process's monotonic clock."""
        return self.world.now + self._shift

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> Any:
        turn = Turn(self, callback, args, context)
        self.queue.append(turn)
        return turn

    call_soon_threadsafe = call_soon

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> Any:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> Any:
        turn = Turn(self, callback, args, context)
        due = max(self.world.now, when - self._shift)
        if self._timers is not self.world.timers:
            due = when  # being disposed of: its own clock is all there is
        heapq.heappush(self._timers, (due, next(self.world.numbers), turn))
        return turn

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Coroutine[Any, Any, Any], *, name: Any = None, context: Any = None
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        self._tasks.append(task)
        return task

    @property
    def tasks(self) -> list[asyncio.Task[Any]]:
        """Those that have not ended."""
        self._tasks = [task for task in self._tasks if not task.done()]
        return self._tasks

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> asyncio.Future[Any]:
        """A thread of its own computes in the middle of the time that it takes."""
        future: asyncio.Future[Any] = self.create_future()
        seconds = self.step_seconds() if executor is not None else 0.0

        def finish(error: BaseException | None, result: Any) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        def compute() -> None:
            try:
                outcome = None, func(*args)
            except Exception as error:
                outcome = error, None
            if seconds:
                self.call_later(seconds / 2, finish, *outcome)
            else:
                finish(*outcome)

        if seconds:
            self.call_later(seconds / 2, compute)
        else:
            compute()
        return future

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.complain(f"{context['message']}: {context.get('exception')!r}")

    async def create_server(self, protocol_factory: Any, host: Any, port: Any, **_: Any) -> Any:
        return self.sockets.listen(self, protocol_factory, f"{host}:{port}")

    async def create_connection(
        self, protocol_factory: Any, host: Any = None, port: Any = None, **_: Any
    ) -> Any:
        return await self.sockets.connect(self, protocol_factory, f"{host}:{port}")
