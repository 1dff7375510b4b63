"""The nouns of both contracts: how tokens are chosen, and what a backend states about itself."""

from __future__ import annotations

from typing import Literal

import msgspec

from transfer.layout import KVLayout, Shard


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen. Defaults change nothing; temperature 0 is greedy.

    Penalties and bias apply to the logits first, then `min_tokens`, temperature, `top_k`,
    `top_p`, `min_p`. `repetition_penalty` looks at prompt and generated tokens, presence and
    frequency at generated ones only. `logprobs` asks for the log probability of the chosen
    token under the raw logits, and for that many of the likeliest; None asks for neither.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False


_NEUTRAL = Sampling()


class Logprob(msgspec.Struct, frozen=True, array_like=True):
    """Log probability of `token`, and the likeliest tokens with theirs, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sequence(msgspec.Struct, kw_only=True, eq=False):
    """One line of tokens, as the backend sees it. The host writes it, between steps only.

    The token sampled next has position `len(prompt) + len(generated)`: with `rng` "positional"
    it depends on nothing but the logits, these two lists, `sampling`, `seed` and that position.
    """

    prompt: list[int]
    generated: list[int]
    sampling: Sampling
    seed: int


class Sampled(msgspec.Struct, frozen=True):
    """A chosen token, and its log probability where that was asked for."""

    token: int
    logprob: Logprob | None = None


class Output(msgspec.Struct, frozen=True):
    """What one row gave: a token for each of its sequences, in order, and prompt logprobs."""

    sampled: tuple[Sampled, ...] = ()
    prompt_logprobs: tuple[Logprob, ...] = ()


class BackendInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a backend states about itself, once, after loading.

    `kind` is the contract that it fulfils, `phases` what it can do: a worker in role `both` needs
    both. `layout` says how `pool` is cut and `pool_blocks` how many blocks it has. For a stepped
    backend that is its capacity; an engine's is `engine_blocks`, the blocks of its own memory, each
    of `layout.block_tokens` tokens, while its pool is the arena that KV crosses.

    `continuation` is "exact" when prefill of prompt and generated tokens agrees to the bit with
    having decoded them, else "equivalent". `rng` is "positional" when sampling is a pure function
    as `Sequence` says, else "engine". `sampling` names the fields of `Sampling` that it honours; a
    request that sets another is placed elsewhere or refused. `end_tokens` end a sequence unless
    `ignore_eos`. `prompt_logprobs` says whether it gives log probabilities of a prompt's own
    tokens; where not, a request for them is refused. `emulated` says that its timing, or its tokens
    too, are made up, and `emulates` after what; that is shown wherever its figures are.

    A backend on several devices, each with a pool for some of the heads, names those heads in
    `shards`, one of them for each pool. `layout` is then that of all heads together, of which each
    pool has its own; a block has the same number in every pool. Nothing is reused across requests.
    """

    layout: KVLayout
    pool_blocks: int
    vocabulary: int
    context_tokens: int
    end_tokens: tuple[int, ...]
    rng: Literal["positional", "engine"]
    continuation: Literal["exact", "equivalent"]
    sampling: frozenset[str]
    max_batch: int = 256
    emulated: bool = False
    emulates: str = ""
    shards: tuple[Shard, ...] = ()
    kind: Literal["stepped", "engine"] = "stepped"
    phases: frozenset[Literal["prefill", "decode"]] = frozenset({"prefill", "decode"})
    prompt_logprobs: bool = True
    engine_blocks: int = 0

    @property
    def capacity_blocks(self) -> int:
        """How many blocks of tokens it can be working on, wherever it keeps them."""
        return self.engine_blocks if self.kind == "engine" else self.pool_blocks

    @property
    def most_blocks(self) -> int:
        """How many blocks the longest prefix may take."""
        return min(self.capacity_blocks, self.pool_blocks)

    def fits(self, tokens: int, sequences: int) -> bool:
        """Whether there can ever be room for such a prefix, and a block more for each sequence."""
        return self.layout.blocks_for(tokens) + sequences <= self.most_blocks

    @property
    def layouts(self) -> tuple[KVLayout, ...]:
        """How each pool is cut."""
        return self.layout.sharded(self.shards)

    def unsupported(self, sampling: Sampling) -> list[str]:
        """Fields of `sampling` that change something and that the backend does not honour."""
        return [
            name
            for name in Sampling.__struct_fields__
            if name not in self.sampling and getattr(sampling, name) != getattr(_NEUTRAL, name)
        ]
