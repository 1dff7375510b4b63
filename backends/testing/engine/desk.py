"""A host of an engine in a few lines: gives it jobs and blocks of the arena, and listens."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from backends.api import (
    DecodeJob,
    EngineBackend,
    Output,
    PoolExhausted,
    PrefillJob,
    Sampled,
    Sampling,
    Sequence,
)
from backends.host.pools import pools_of
from backends.testing.desk import GREEDY, PATIENCE_SECONDS, Bytes
from backends.testing.engine.ear import Ear, Story
from backends.testing.form import Broken, Hangs, described
from backends.testing.memory import cells
from transfer.layout import KVLayout
from transfer.pool import Pool

CANARY = 0x5B
"""What the arena is filled with, to see what is written to it."""

QUIET_SECONDS = 0.1
"""How long nothing must come where nothing may come."""


class Asked:
    """A job that the engine was given, what it said of it, and the job's blocks of the arena."""

    def __init__(self, job: PrefillJob | DecodeJob, story: Story) -> None:
        """It is about to be given."""
        self.job, self.story = job, story

    @property
    def blocks(self) -> tuple[int, ...]:
        """Of the arena."""
        return self.job.blocks

    @property
    def first(self) -> Sampled:
        """The token after the prefix."""
        return self.story.outputs[0].sampled[0]


class EngineDesk:
    """One engine, started, and the free blocks of its arena in a shuffled order."""

    def __init__(
        self, backend: EngineBackend, seed: int = 0, patience: float = PATIENCE_SECONDS
    ) -> None:
        """Start it."""
        self.backend, self.info, self.patience = backend, backend.info, patience
        self.layout: KVLayout = backend.info.layout
        self.ear = Ear()
        self._names = itertools.count(1)
        self._seed = seed
        self.calls: dict[str, list[float]] = {}
        self.clear()
        self._call("start", backend.start, self.ear)

    def clear(self) -> None:
        """Every block of the arena is free again; listen to what is new alone."""
        order = np.random.default_rng(self._seed).permutation(self.info.pool_blocks)
        self.free: list[int] = order.tolist()
        self.ear.watch = None
        self.ear.forget()

    def close(self) -> None:
        """Close it, in another thread than it was called from.

        Raises:
            Hangs: it does not return.
        """
        pool = ThreadPoolExecutor(1, thread_name_prefix="close")
        try:
            pool.submit(self.backend.close).result(self.patience)
        except TimeoutError:
            raise Hangs(f"close did not return within {self.patience:.0f} s") from None
        finally:
            pool.shutdown(wait=False)

    # ---- the arena

    @property
    def pools(self) -> list[Pool]:
        """Where each pool of the arena lies."""
        return [
            Pool.of(it.layout, self.info.pool_blocks, it.memory)
            for it in pools_of(self.info, self.backend.pool)
        ]

    def fill(self) -> None:
        """Write the canary everywhere."""
        for it in pools_of(self.info, self.backend.pool):
            memoryview(it.memory).cast("B")[:] = bytes([CANARY]) * memoryview(it.memory).nbytes

    def arena(self, blocks: Items[int] | None = None) -> list[Bytes]:
        """A copy of it, or of some blocks in that order, as [block, layer, token, byte]."""
        return [array for pool in self.pools for array in cells(pool, blocks)]

    def take(self, tokens: int) -> tuple[int, ...]:
        """Free blocks for so many tokens."""
        return tuple(self.free.pop() for _ in range(self.layout.blocks_for(tokens)))

    # ---- jobs

    def prefill(
        self,
        prompt: Iterable[int],
        sampling: Sampling = GREEDY,
        *,
        seeds: Items[int] = (0,),
        export: bool = True,
        blocks: tuple[int, ...] = (),
        scores: int | None = None,
        salt: bytes = b"",
    ) -> Asked:
        """Ask for a prefix, into these blocks or, to export it, any."""
        tokens = list(prompt)
        job = PrefillJob(
            name=self._name("prefill"),
            salt=salt,
            tokens=tokens,
            blocks=blocks or (self.take(len(tokens)) if export else ()),
            sequences=tuple(
                Sequence(prompt=tokens, generated=[], sampling=sampling, seed=seed)
                for seed in seeds
            ),
            prompt_logprobs=scores,
        )
        return self._ask("prefill", job)

    def decode(
        self,
        prompt: Iterable[int],
        generated: Iterable[int] = (),
        sampling: Sampling = GREEDY,
        *,
        blocks: tuple[int, ...] = (),
        seed: int = 0,
        tokens: int = 1,
        scores: int | None = None,
        salt: bytes = b"",
    ) -> Asked:
        """Ask for `tokens` more, from the arena where there are `blocks`."""
        known = list(generated)
        job = DecodeJob(
            name=self._name("decode"),
            salt=salt,
            sequence=Sequence(prompt=list(prompt), generated=known, sampling=sampling, seed=seed),
            max_tokens=len(known) + tokens,
            blocks=blocks,
            prompt_logprobs=scores,
        )
        return self._ask("decode", job)

    def abort(self, asked: Asked | str) -> None:
        """Want no more of a job."""
        name = asked if isinstance(asked, str) else asked.job.name
        self._call("abort", self.backend.abort, name)

    def pins(self) -> dict[str, int]:
        """What its jobs hold of its memory."""
        held: dict[str, int] = {}
        self._call("pins", lambda _: held.update(self.backend.pins()), None)
        return held

    def until(self, asked: Asked, true: Callable[[Story], Any], what: str) -> None:
        """Wait for something to be said.

        Raises:
            Hangs: it is not.
            Broken: the job fails or ends first.
        """
        story = asked.story
        over = self.ear.wait(
            lambda: bool(true(story) or story.errors or story.ended), self.patience
        )
        if true(story):
            return
        if self.ear.death is not None:
            raise Hangs(f"it said that it died: {self.ear.death}")
        if not over:
            raise Hangs(f"{what} of {story.name} was not said within {self.patience:.0f} s")
        if story.errors:
            raise Broken(f"{story.name} failed: {described(story.errors[0])}")
        raise Broken(f"{story.name} ended, but {what} was never said")

    def end(self, asked: Asked) -> None:
        """Wait for the end, which must come once; failing counts as an end.

        Raises:
            Hangs: it does not.
        """
        story = asked.story
        if not self.ear.wait(lambda: bool(story.ended), self.patience):
            raise Hangs(
                f"ended was not said of {story.name} within {self.patience:.0f} s; say it as soon "
                "as the memory of a job is free, however it came to its end"
            )

    def done(self, asked: Asked) -> Asked:
        """Wait until a prefix is computed and has ended."""
        self.until(asked, lambda it: it.outputs, "prefilled")
        self.end(asked)
        return asked

    def told(self, asked: Asked, count: int) -> list[Sampled]:
        """Wait for so many tokens, then want no more: the tokens."""
        self.until(asked, lambda it: len(it.tokens) >= count, f"token {count}")
        self.abort(asked)
        self.end(asked)
        return asked.story.tokens[:count]

    def alone(
        self, prompt: Items[int], count: int, sampling: Sampling = GREEDY, *, seed: int = 0
    ) -> list[Sampled]:
        """What it generates in place."""
        return self.told(self.decode(prompt, (), sampling, seed=seed, tokens=count), count)

    def tokens(self, asked: Asked, count: int) -> list[Sampled]:
        """So many tokens of a sequence, or the one of a prefix."""
        if isinstance(asked.job, DecodeJob):
            return self.told(asked, count)
        return [self.output(self.done(asked)).sampled[0]]

    def output(self, asked: Asked) -> Output:
        """What a prefix gave, in the right shape.

        Raises:
            Broken: it has another one.
        """
        assert isinstance(asked.job, PrefillJob)
        wanted, found = len(asked.job.sequences), asked.story.outputs[0]
        if len(found.sampled) != wanted:
            raise Broken(
                f"prefilled: {len(found.sampled)} tokens for {wanted} sequences; sample one for "
                "each, and none where there is none"
            )
        return found

    def quiet(self) -> None:
        """Give it time to say, and do, what it must not."""
        time.sleep(QUIET_SECONDS)

    def _name(self, what: str) -> str:
        return f"{what}#{next(self._names)}"

    def _ask(self, call: str, job: PrefillJob | DecodeJob) -> Asked:
        asked = Asked(job, self.ear.story(job.name))
        try:
            self._call(call, getattr(self.backend, call), job)
        except PoolExhausted as error:
            asked.story.errors.append(error)
            asked.story.ended = 1  # it was never taken
        return asked

    def _call(self, name: str, function: Callable[..., Any], argument: Any) -> None:
        """Call it in a thread of its own, and note how long it takes.

        Raises:
            Hangs: it does not return.
        """
        raised: list[Exception] = []
        took: list[float] = []

        def call() -> None:
            began = time.perf_counter()
            try:
                function(argument)
            except Exception as error:  # it comes out below
                raised.append(error)
            took.append(time.perf_counter() - began)

        thread = threading.Thread(target=call, name=name, daemon=True)
        thread.start()
        thread.join(self.patience)
        if not took:
            raise Hangs(f"{name} did not return within {self.patience:.0f} s")
        self.calls.setdefault(name, []).append(took[0])
        if raised:
            raise raised[0]
