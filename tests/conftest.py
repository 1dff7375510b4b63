"""What every test leaves behind, or rather does not."""

import gc
from collections.abc import Iterator

import pytest

from transfer import shared_memory


@pytest.fixture(autouse=True)
def _no_pools_left_in_memory() -> Iterator[None]:
    """Pools of workers that have ended are in reference cycles, and all of their pages are real."""
    yield
    if len(shared_memory._mappings) > 8:
        gc.collect()
