"""The HTTP side over real sockets; `carrier.py` has the relay behind it."""

import asyncio
from collections.abc import AsyncIterator, Callable

import aiohttp
import pytest
import uvloop
from carrier import Served, serving

from gateway.cli.model import find_model
from gateway.text import Vocabulary, load_text


@pytest.hookimpl(optionalhook=True)  # versions of pytest-asyncio without it use asyncio's loop
def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that production uses: it buffers writes otherwise than asyncio's."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return load_text(find_model("bundled"))


@pytest.fixture
async def served(vocabulary: Vocabulary) -> AsyncIterator[Served]:
    async with serving(vocabulary) as one:
        yield one
        assert one.carrier.running == 0, "a request left something running"


@pytest.fixture
async def http(served: Served) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(served.url) as session:
        yield session
