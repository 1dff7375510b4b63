"""A fleet of one kind of server: one alone, or two of which one computes the prompts.

What all kinds have in common is here: their options, the model's name on every server, what a
worker says of itself. What is asked, and how answers read, is each kind's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import msgspec

from backends.api import (
    BackendInfo,
    BackendMisconfigured,
    DecodeJob,
    KVLayout,
    Logprob,
    Sampled,
)
from backends.checkpoint.checks import MOST, check_whole
from backends.checkpoint.spec import ModelSpec
from backends.served.http import Server, check_seconds

MODELS = "/v1/models"
MOST_TOKENS = 1 << 40


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `[workers.X.options]` may say of any fleet; see `ServedBackend`."""

    model: str
    decode: str
    prefill: str = ""
    served_model: str = ""
    capacity_tokens: int = 1 << 18
    context_tokens: int | None = None
    max_batch: int = 256
    silence_seconds: float = 60.0
    open_seconds: float = 30.0

    def check(self) -> None:
        """Refuse what is no number of tokens, sequences or seconds.

        Raises:
            BackendMisconfigured: names the first such option.
        """
        check_whole("capacity_tokens", self.capacity_tokens, MOST_TOKENS)
        for name in ("context_tokens", "max_batch"):
            check_whole(name, getattr(self, name), MOST[name])
        for name in ("silence_seconds", "open_seconds"):
            check_seconds(name, getattr(self, name))


class Progressed(msgspec.Struct, frozen=True):
    """What a fleet gave for a job: new tokens, or that its prompt is done."""

    tokens: tuple[Sampled, ...] = ()
    prefilled: bool = False
    prompt_logprobs: tuple[Logprob, ...] = ()
    cached: int = 0


class Fleet(ABC):
    """How one kind of server is asked. All is called on one event loop."""

    def __init__(self, options: Options) -> None:
        """Nothing is asked yet."""
        self._options = options
        self._decode = Server(options.decode, options.silence_seconds)
        self._prefill = (
            Server(options.prefill, options.silence_seconds) if options.prefill else None
        )
        self._name = ""
        self._ends: tuple[int, ...] = ()
        self._length = 0

    @abstractmethod
    async def open(self) -> BackendInfo:
        """Find out what the servers can do.

        Raises:
            BackendError: one cannot be reached, or they do not fit together.
        """

    @abstractmethod
    def generate(self, job: DecodeJob) -> AsyncGenerator[Progressed, None]:
        """Carry a job out. Closing the generator has the servers stop.

        Raises:
            BackendError: it cannot go on; says why.
        """

    async def close(self) -> None:
        """Close every connection."""
        for server in self._servers:
            await server.close()

    # ---- for the kinds of servers

    @property
    def _servers(self) -> list[Server]:
        return [self._decode, self._prefill] if self._prefill is not None else [self._decode]

    async def _join(self, server: Server) -> Mapping[str, Any]:
        """Begin to speak with a server; what it says of the model, on whose name all must agree.

        Raises:
            BackendError: it cannot be reached, or does not serve it.
        """
        await server.open()
        answer = await server.get(MODELS)
        try:
            served = {str(one["id"]): one for one in answer["data"]}
        except (KeyError, TypeError) as error:
            raise BackendMisconfigured(f"{server.address}{MODELS}: no models: {error!r}") from error
        only = next(iter(served)) if len(served) == 1 else ""
        wanted = self._options.served_model or self._name or only
        if wanted not in served:
            raise BackendMisconfigured(
                f"served_model: {server.address} serves {', '.join(sorted(served))}"
            )
        self._name = wanted
        found: Mapping[str, Any] = served[wanted]
        return found

    def _settle(
        self,
        model: str,
        spec: ModelSpec,
        longest: int,
        sampling: frozenset[str],
        *,
        prompt_logprobs: bool,
    ) -> BackendInfo:
        """What the worker says of itself; from now on jobs can be asked for.

        `longest` is how long a sequence may be there, the token after the last included.
        """
        options = self._options
        self._ends, self._length = spec.end_tokens, longest
        layout = no_layout(model)
        blocks = layout.blocks_for(options.capacity_tokens)
        return BackendInfo(
            layout=layout,
            pool_blocks=blocks,
            kind="engine",
            engine_blocks=blocks,
            vocabulary=spec.vocabulary,
            context_tokens=longest - 1,
            end_tokens=self._ends,
            rng="engine",
            continuation="equivalent",
            sampling=sampling,
            prompt_logprobs=prompt_logprobs,
            max_batch=options.max_batch,
        )

    def _left(self, job: DecodeJob) -> int:
        """How many tokens a job may have yet."""
        wanted = job.max_tokens - len(job.sequence.generated)
        return min(wanted, self._length - len(job.context))


def no_layout(model: str, block_tokens: int = 16) -> KVLayout:
    """The layout of an arena that nothing is ever written to; it goes with no other."""
    return KVLayout(
        model=f"served {model}"[:256],
        weights="served",
        layers=1,
        kv_heads=1,
        head_dim=2,
        dtype="float16",
        block_tokens=block_tokens,
        rope="half",
    )


def salt_of(job: DecodeJob) -> str:
    """Only jobs with the same one may share what servers keep; without a salt, none may."""
    return job.salt.hex() or f"only {job.name}"
