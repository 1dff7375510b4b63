"""A backend offers as many pools as it states, each as large as its layout says."""

import msgspec
import numpy as np
import pytest

from backends.api import BackendMisconfigured, Shard
from backends.emulation.synthetic import SyntheticBackend
from backends.host.plugins import assert_pool_fits
from backends.host.pools import pools_of

TWO = (Shard(0, 1), Shard(1, 3))


@pytest.fixture
def backend() -> SyntheticBackend:
    made = SyntheticBackend(kv_heads=4, pool_tokens=64)
    made.info = msgspec.structs.replace(made.info, shards=TWO)
    return made


def test_each_pool_has_the_layout_of_its_heads(backend: SyntheticBackend) -> None:
    quarter = backend.pool.size // 4
    backend.pool = [backend.pool[:quarter], backend.pool[quarter:]]  # type: ignore[assignment]
    assert_pool_fits("two", backend)
    pools = pools_of(backend.info, backend.pool)
    assert [it.layout.shard for it in pools] == list(TWO)
    assert {it.layout.kv_heads for it in pools} == {4}


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ([2], "pool: .* are not .* blocks"),
        ([1, 2], "3 of them for 2 shards"),
        ([], "1 of them for 2 shards"),
    ],
)
def test_pools_that_do_not_fit_are_refused(
    backend: SyntheticBackend, cuts: list[int], message: str
) -> None:
    quarter = backend.pool.size // 4
    backend.pool = np.split(backend.pool, [it * quarter for it in cuts])  # type: ignore[assignment]
    with pytest.raises(BackendMisconfigured, match=message):
        assert_pool_fits("two", backend)
