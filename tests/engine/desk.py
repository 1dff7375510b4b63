"""What the tests of engines share: workers with one, the true text, and nothing left anywhere."""

from functools import cache
from typing import Any

from backends.api import Row, Sampling, Sequence
from backends.emulation.synthetic import SyntheticBackend
from backends.host.engine import EngineLoop
from tests.engine.small import SmallEngine
from tests.life.cluster import SHAPE, Cluster
from tests.support.patience import PATIENCE_SECONDS

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


async def clean(made: Cluster, seconds: float = PATIENCE_SECONDS) -> None:
    """Every block of every arena is free, and so is all that the engines had of their own."""
    await made.balanced(seconds)
    loops: list[Any] = [host._requests.steps for host in made.hosts.values()]
    await made.until(lambda: not any(loop.pins.held or loop.pins.wrong for loop in loops), seconds)
    engines = [loop for loop in loops if isinstance(loop, EngineLoop)]
    await made.until(lambda: not any(it._open or it._given or it._untold._jobs for it in engines))


@cache
def true_line(prompt: tuple[int, ...], seed: int, tokens: int) -> list[int]:
    """What follows a prompt."""
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
    return {index: true_line(tuple(prompt), 7 + index, tokens) for index in range(n)}
