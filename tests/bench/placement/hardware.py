"""What workers and links take, and workers that take it, step by step in virtual time.

A worker is modelled after `backends.host.steps`: a step computes one row of every sequence that
is decoded and, under the token budget, chunks of prompts in the order they came.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush

from backends.api import BackendInfo, KVLayout
from backends.protocol import Role, Sampling

STEP_TOKENS = 2048
STEPS_AHEAD = 8  # as backends.host.worker has it
NOISE = 0.05


@dataclass(frozen=True)
class Device:
    """Seconds: per step, per prompt token, per pair of them, per row, per token looked back on.

    The numbers are those of an 8-billion-parameter model with 32 layers and 8 KV heads of 128 in
    bfloat16 on a device with 400 TFLOP/s and 2.2 TB/s of what can be had, at speed 1.
    """

    speed: float = 1.0
    step: float = 8e-3
    token: float = 4.2e-5
    square: float = 3.3e-10
    row: float = 2e-5
    back: float = 6e-8
    pool_tokens: int = 400_000
    max_batch: int = 256

    def prefill_seconds(self, start: int, end: int) -> float:
        """Prompt tokens from `start` to `end`."""
        return (self.token * (end - start) + self.square * (end**2 - start**2)) / self.speed

    def decode_seconds(self, rows: int, context: int) -> float:
        """One step of so many sequences that look back on so many tokens."""
        return (self.step + self.row * rows + self.back * context) / self.speed

    def whole_prefill(self, tokens: int) -> float:
        """A prompt on an idle device."""
        return self.prefill_seconds(0, tokens) + 2e-3 * -(-tokens // STEP_TOKENS)


@dataclass(frozen=True)
class Wire:
    """A link on which most of a handoff hides behind prefill."""

    base: float = 3e-3
    bytes_per_second: float = 25e9
    exposed: float = 0.15

    def seconds(self, count: int) -> float:
        """What the decode worker waits for once prefill is over."""
        return self.base + self.exposed * count / self.bytes_per_second


def info(device: Device, tokens: int) -> BackendInfo:
    """What a worker with that device states."""
    layout = KVLayout(
        model="8b", weights="bfloat16", layers=32, kv_heads=8, head_dim=128, dtype="bfloat16",
        block_tokens=16, rope="half",
    )  # fmt: skip
    return BackendInfo(
        layout=layout,
        pool_blocks=device.pool_tokens // 16,
        vocabulary=128_000,
        context_tokens=tokens,
        end_tokens=(),
        rng="positional",
        continuation="exact",
        sampling=frozenset(Sampling.__struct_fields__),
        max_batch=device.max_batch,
    )


@dataclass(eq=False)
class Prompt:
    """Work for a prefill worker."""

    tokens: int
    prefilled: Callable[[float], None]
    done: int = 0
    started: float | None = None


@dataclass(eq=False)
class Machine:
    """One worker. `at` runs a callable after so many seconds; `now` is the time."""

    id: str
    role: Role
    device: Device
    rng: random.Random
    now: Callable[[], float]
    at: Callable[[float, Callable[[], None]], None]
    used_blocks: int = 0
    steps: int = 0
    context: int = 0
    told: tuple[int, float] = (0, 0.0)
    _prompts: deque[Prompt] = field(default_factory=deque)
    _rows: int = 0
    _decoded: float = 0.0  # tokens of each sequence, since the beginning
    _ends: list[tuple[float, int, int, Callable[[], None]]] = field(default_factory=list)
    _numbers: int = 0
    _busy: bool = False

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens not yet computed."""
        return sum(it.tokens - it.done for it in self._prompts)

    @property
    def running(self) -> int:
        """Sequences being decoded; those beyond the largest batch take turns with the others."""
        return self._rows

    def prefill(self, prompt: Prompt) -> None:
        """Compute it when its turn comes."""
        self._prompts.append(prompt)
        self._go()

    def decode(self, context: int, tokens: int, ended: Callable[[], None]) -> None:
        """Decode so many tokens of one sequence."""
        self._rows += 1
        self.context += context
        self._numbers += 1
        heappush(self._ends, (self._decoded + tokens, self._numbers, context + tokens, ended))
        self._go()

    def _go(self) -> None:
        if self._busy or not (self._prompts or self._rows):
            return
        self._busy = True
        rows, seconds, told = min(self._rows, self.device.max_batch), 0.0, []
        if rows:
            seconds += self.device.decode_seconds(rows, self.context * rows // self._rows)
        budget = STEP_TOKENS - rows
        for prompt in list(self._prompts):
            if budget < 1:
                break
            if prompt.started is None:
                prompt.started = self.now()
            end = min(prompt.tokens, prompt.done + budget)
            seconds += self.device.prefill_seconds(prompt.done, end)
            budget -= end - prompt.done
            prompt.done = end
            if end == prompt.tokens:
                told.append(prompt)
                self._prompts.popleft()
        if not rows:
            seconds += 2e-3
        self.at(seconds * self.rng.lognormvariate(0, NOISE), lambda: self._end(rows, told))

    def _end(self, rows: int, told: list[Prompt]) -> None:
        self._busy = False
        if rows:
            self.steps += 1
            self.context += rows
            self._decoded += rows / max(rows, self._rows)
            while self._ends and self._ends[0][0] <= self._decoded + 1e-6:
                _, _, context, ended = heappop(self._ends)
                self._rows -= 1
                self.context -= context
                ended()
        for prompt in told:
            assert prompt.started is not None
            prompt.prefilled(self.now() - prompt.started)
        self._go()
