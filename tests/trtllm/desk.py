"""A host in a few lines: gives jobs to the engine and writes down what it answers."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from backends.api import PrefillJob, Sampling, Sequence
from backends.emulation.pattern import Pattern
from tests.support.patience import PATIENCE_SECONDS
from tests.trtllm.play import Gates, standin, until, write_model


class Heard:
    """Every event, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.ends: dict[str, int] = {}
        self.dead = ""
        self._lock = threading.Lock()

    def _add(self, *event: Any) -> None:
        with self._lock:
            self.events.append(event)

    def ready(self, job: str, start: int, end: int, layer: int | None = None) -> None:
        self._add("ready", job, start, end)

    def prefilled(self, job: str, output: Any, cached: int = 0) -> None:
        self._add("prefilled", job, [it.token for it in output.sampled], cached)

    def imported(self, job: str) -> None:
        raise AssertionError

    def decoded(self, tokens: Any) -> None:
        raise AssertionError

    def failed(self, job: str, error: Exception) -> None:
        self._add("failed", job, str(error))

    def ended(self, job: str) -> None:
        self.ends[job] = self.ends.get(job, 0) + 1
        self._add("ended", job)

    def died(self, reason: str) -> None:
        self.dead = reason

    def of(self, job: str) -> list[tuple[Any, ...]]:
        with self._lock:
            return [(kind, *rest) for kind, name, *rest in self.events if name == job]

    def kinds(self, job: str) -> list[str]:
        return [kind for kind, *_ in self.of(job)]


class Desk:
    """One engine on a stand-in."""

    def __init__(self, engine: Any, gates: Gates) -> None:
        self.engine, self.gates = engine, gates
        self.heard = Heard()
        self._jobs = 0
        self._free = list(range(engine.info.pool_blocks))[::-1]
        engine.start(self.heard)

    @property
    def llm(self) -> Any:
        return self.engine._library._llm

    def job(self, tokens: list[int], *, n: int = 1, salt: bytes = b"t", **more: Any) -> PrefillJob:
        self._jobs += 1
        sequences = tuple(
            Sequence(prompt=tokens, generated=[], sampling=Sampling(), seed=it) for it in range(n)
        )
        blocks = [self._free.pop() for _ in range(self.engine.info.layout.blocks_for(len(tokens)))]
        job = PrefillJob(
            name=f"job-{self._jobs}",
            salt=salt,
            tokens=tokens,
            blocks=tuple(blocks),
            sequences=sequences,
            **more,
        )
        self.engine.prefill(job)
        return job

    def ended(self, *jobs: PrefillJob, seconds: float = PATIENCE_SECONDS) -> None:
        until(lambda: all(it.name in self.heard.ends for it in jobs) or self.heard.dead, seconds)
        assert not self.heard.dead, self.heard.dead

    def done(self, tokens: list[int], **more: Any) -> PrefillJob:
        """A job that has ended well, and whose KV is right."""
        job = self.job(tokens, **more)
        self.ended(job)
        kinds = self.heard.kinds(job.name)
        assert kinds[-2:] == ["prefilled", "ended"], self.heard.of(job.name)
        assert wrong(self.engine, tokens, job.blocks) is None
        return job

    def answered(self, job: PrefillJob) -> None:
        """Wait until the library's answer is there, while the gate `answered` is shut."""
        until(lambda: self.gates.reached("answered"))
        carried = self.engine._carrier._jobs[job.name]
        until(lambda: carried.results and carried.results[0].finished)

    def settle(self) -> None:
        """Let the engine do what it can do now: a few rounds of its loop."""
        for _ in range(5):
            turned = threading.Event()
            self.engine._background.post(turned.set)
            assert turned.wait(PATIENCE_SECONDS)

    def free(self) -> None:
        """Nothing is left of any job: no pin here, no block in the engine."""
        assert not self.engine.pins()
        assert not self.engine._carrier._requests
        assert not self.engine._carrier._jobs
        args = self.llm.args.kv_cache_config
        whole = args.max_tokens // args.tokens_per_block
        until(lambda: self.llm.pinned == 0 and self.llm.free_blocks in (whole, None))


def wrong(engine: Any, tokens: list[int], blocks: Any) -> tuple[int, int] | None:
    """Position and layer of the first number in the arena that is not what the tokens say."""
    info = engine.info
    pools = engine.pool if info.shards else [engine.pool]
    whole = info.layout
    views = []
    for layout, pool in zip(info.layouts, pools, strict=True):
        kind = np.uint32 if layout.item_bytes == 4 else np.uint16
        views.append(pool.view(kind).reshape(tuple(layout.sizes(info.pool_blocks).values())))
    joined = np.ascontiguousarray(np.concatenate(views, axis=3))
    pattern = Pattern(whole, joined.reshape(-1).view(np.uint8), info.pool_blocks)
    return pattern.first_difference(tokens, list(blocks))


@contextmanager
def desk(
    folder: Path,
    flavour: str = "1.3",
    *,
    model: dict[str, Any] | None = None,
    processes: bool = False,
    lacks: str = "",
    knobs: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[Desk]:
    """An engine on a stand-in of that release."""
    folder.mkdir(exist_ok=True)
    gates = Gates(folder / "gates")
    path = write_model(folder / "model", **(model or {}))
    settings = {
        "model": str(path),
        "identity": "standin",
        "block_tokens": 16,
        "pool_tokens": 4096,
        "chunk_tokens": 64,
        **options,
    }
    settings.setdefault("kv_cache", {"max_tokens": 2048})
    more = {"gates": str(gates), **(knobs or {})}
    with standin(flavour, processes=processes, lacks=lacks, **more):
        from backends.tensorrt_llm.engine import TensorRTLLM

        engine = TensorRTLLM(**settings)
        try:
            yield Desk(engine, gates)
        finally:
            for gate in (folder / "gates").glob("*"):
                gate.unlink(missing_ok=True)
            engine.close()
