"""What every test may have, and what it leaves behind, or rather does not."""

import asyncio
import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from transfer import shared_memory


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """One real Redis for every test that has names of its own there."""
    # Not above: transfer's tests also run where there is no Redis.
    from tests.control.conftest import LiveServer, programs

    with tempfile.TemporaryDirectory(prefix="baton-test-") as folder:
        server = LiveServer(next(iter(programs().values())), Path(folder))
        asyncio.run(server.start())
        yield server.url
        server.kill()


@pytest.fixture(autouse=True)
def _no_pools_left_in_memory() -> Iterator[None]:
    """Pools of workers that have ended are in reference cycles, and all of their pages are real."""
    yield
    if len(shared_memory._mappings) > 8:
        gc.collect()
