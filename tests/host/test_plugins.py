"""What an operator may say to a plug-in, and what only the worker does."""

from typing import Any

import pytest

from backends.emulation.synthetic import SyntheticBackend
from backends.errors import BackendMisconfigured
from backends.host.plugins import construct
from tests.host.test_control import SHAPE


def acme(*, progress: Any, pool_tokens: int = 512) -> SyntheticBackend:
    """Tells how far it has loaded, whoever listens."""
    progress("loading", 0.5)
    return SyntheticBackend(**{**SHAPE, "pool_tokens": pool_tokens})


def anything(**options: Any) -> SyntheticBackend:
    return SyntheticBackend(**SHAPE)


def test_whoever_must_tell_its_progress_can_do_so_also_where_nobody_waits() -> None:
    told: list[tuple[str, float]] = []
    construct("acme", acme, {}).close()
    construct("acme", acme, {}, lambda phase, part: told.append((phase, part))).close()
    assert told == [("loading", 0.5)]


@pytest.mark.parametrize("factory", [acme, anything])
def test_progress_is_no_option(factory: Any) -> None:
    with pytest.raises(BackendMisconfigured, match="'acme' has no option 'progress'"):
        construct("acme", factory, {"pool_tokens": 512, "progress": 1})


def test_an_option_that_is_unknown_is_named_with_the_one_that_is_meant() -> None:
    with pytest.raises(BackendMisconfigured) as error:
        construct("acme", acme, {"pool_token": 512})
    assert str(error.value) == (
        "backend 'acme' has no option 'pool_token' (did you mean 'pool_tokens'?); "
        "it has: pool_tokens"
    )
    with pytest.raises(BackendMisconfigured, match="no option 'colour'; it has: pool_tokens"):
        construct("acme", acme, {"colour": "red"})
