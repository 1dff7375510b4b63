"""Baton as a server to be measured."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loadtest.bench.process import NotStarted
from loadtest.bench.servers import Cores, Target
from loadtest.bench.upstream import Pace


@contextmanager
def baton(folder: Path, cores: Cores, pace: Pace, interval: float) -> Iterator[Target]:
    raise NotStarted("not yet")
    yield
