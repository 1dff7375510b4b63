import gc
from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of handoffs fail on purpose; nobody wants to read of it."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    yield
    structlog.configure(**before)


@pytest.fixture(autouse=True)
def _spared_collector() -> Iterator[None]:
    """Every game leaves cycles behind; what was there before need not be looked through."""
    gc.collect()
    gc.freeze()
    before = gc.get_threshold()
    gc.set_threshold(100_000, 10, 10)
    yield
    gc.set_threshold(*before)
    gc.unfreeze()
