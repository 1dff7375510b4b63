import gc
from collections.abc import Iterator

import pytest
import structlog

from tests.chaos.machine import spare_us


@pytest.fixture(autouse=True)
def _spared() -> Iterator[None]:
    """Thousands of handoffs fail on purpose; nobody wants to read of it."""
    before = structlog.get_config(), gc.get_threshold()
    spare_us()
    yield
    structlog.configure(**before[0])
    gc.set_threshold(*before[1])
    gc.unfreeze()
