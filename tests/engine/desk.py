"""What the tests of engines share: workers with one, the true text, and nothing left anywhere."""

import asyncio
from functools import cache
from typing import Any

from backends.api import Row, Sampling, Sequence
from backends.emulation.synthetic import SyntheticBackend
from tests.engine.small import SmallEngine
from tests.life.cluster import SHAPE, Cluster

SMALL = {name: value for name, value in SHAPE.items() if name != "verify_kv"}


def engine(kind: type[SmallEngine] = SmallEngine, **options: Any) -> Any:
    return kind(**{**SMALL, **options})


async def start_pair(made: Cluster, pair: str, **options: Any) -> None:
    """Workers `p` and `d` of these kinds, or `b` that does both."""
    kinds = pair.split()
    roles = {"b": "both"} if len(kinds) == 1 else {"p": "prefill", "d": "decode"}
    for (name, role), kind in zip(roles.items(), kinds, strict=True):
        backend = engine(**options) if kind == "engine" else None
        await made.start(name, role, backend=backend)
    if len(kinds) == 1:
        await made.until(lambda: made.fleet.snapshot().workers)
    else:
        await made.paired()


async def clean(made: Cluster, seconds: float = 2.0) -> None:
    """Every block of every arena is free, and the engines hold nothing of their own either."""
    await made.balanced(seconds)
    async with asyncio.timeout(seconds):
        while True:
            books = await made.fleet.ledgers()
            if not any(reason == "engine" for book in books for reason, _, _ in book.holders):
                break
            await asyncio.sleep(0.01)
    for host in made.hosts.values():
        loop = host._requests.steps
        assert not getattr(loop, "_open", None)
        assert not getattr(loop, "_given", None)


@cache
def _true(prompt: tuple[int, ...], seed: int, tokens: int) -> list[int]:
    backend = SyntheticBackend(**SHAPE)
    sequence = Sequence(prompt=list(prompt), generated=[], sampling=Sampling(), seed=seed)
    blocks = list(range(backend.info.layout.blocks_for(len(prompt) + tokens)))
    row = Row(tokens=list(prompt), start=0, blocks=blocks, sequences=(sequence,))
    for _ in range(tokens):
        (output,) = backend.step([row], lambda _row, _layer: None)
        sequence.generated.append(output.sampled[0].token)
        start = len(prompt) + len(sequence.generated) - 1
        row = Row(tokens=sequence.generated[-1:], start=start, blocks=blocks, sequences=(sequence,))
    return sequence.generated


def truth(prompt: list[int], n: int, tokens: int) -> dict[int, list[int]]:
    """What `Cluster.job` gives when nothing disturbs it."""
    return {index: _true(tuple(prompt), 7 + index, tokens) for index in range(n)}
