"""A worker whose engine stops answering in one of several ways."""

import asyncio
import sys
import threading
from typing import Any

from backends.host import HostConfig, WorkerHost
from tests.engine.desk import engine
from tests.engine.small import SmallEngine, Work
from tests.host.test_control import SHAPE

ANSWER_SECONDS = 0.5


class Deaf(SmallEngine):
    """Never ends what was aborted, but goes on with all else."""

    def _on_abort(self, name: str) -> None:
        pass


class Silent(SmallEngine):
    """Its thread ends in the middle of everything, as one that has crashed."""

    def _listen(self) -> bool:
        return super()._listen() and not any(len(it.tokens) > 45 for it in self._active)

    def close(self) -> None:
        pass


class Dying(SmallEngine):
    """Finds out that its device is gone, and says so."""

    def _finish(self, work: Work) -> None:
        self.events.died("the device is gone")


class Lingering(SmallEngine):
    """Does all that it should, but cannot be closed."""

    def close(self) -> None:
        threading.Event().wait()


WAYS: dict[str, type[SmallEngine]] = {
    "deaf": Deaf,
    "silent": Silent,
    "dying": Dying,
    "lingering": Lingering,
}


async def serve(path: str, way: str) -> None:
    options: dict[str, Any] = {**SHAPE, "pool_tokens": 4096, "step_seconds": 0.002}
    config = HostConfig(
        id="w", role="both", listen=f"unix:{path}", step_timeout_seconds=ANSWER_SECONDS
    )
    await WorkerHost(config, engine(WAYS[way], **options)).run(lambda: print("ready", flush=True))


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], sys.argv[2]))
