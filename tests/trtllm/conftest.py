"""One real Redis for the tests of engines."""

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.control.conftest import LiveServer, programs


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="baton-test-") as folder:
        server = LiveServer(next(iter(programs().values())), Path(folder))
        asyncio.run(server.start())
        yield server.url
        server.kill()
