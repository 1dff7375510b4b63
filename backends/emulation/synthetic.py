"""A backend without weights: tokens, KV and timing by formula, for load tests.

Tokens are a function of prompt, seed and position. The KV of a position is a function of the
tokens up to it, and the next position is computed from what lies in the pool, so that a wrong
page shows. Time is that of an accelerator's profile (`timing.py`), or a plain number of seconds.
numpy only; nothing here knows torch or a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items

import numpy as np
from numpy.typing import NDArray

from backends.api import (
    BackendInfo,
    Logprob,
    Output,
    Ready,
    Row,
    Sampled,
    Sampling,
    Sequence,
    allocate,
)
from backends.emulation.checks import (
    DEFAULT_AXES,
    blocks_in,
    checked_layout,
    seconds,
    token_ids,
    whole,
)
from backends.emulation.pace import Pace
from backends.emulation.pattern import Pattern, mix, prefix_states
from backends.emulation.profile import Shape, load_shape
from backends.emulation.timing import read_timing
from backends.errors import BackendMisconfigured, StepFailed

DEFAULT_POOL_TOKENS = 65536


class SyntheticBackend:
    """Deterministic tokens at a set pace, with KV bytes of a given shape really written.

    With `profile` and `model_shape` steps last as long as on that accelerator with that model
    (see `timing.py`), whose sizes are then those of the KV, and the pool is no larger than what
    it has room for. Without, a step takes `step_seconds`, plus `prefill_seconds_per_token` for
    each token of a prefill chunk. Steps that follow each other closely tick at absolute times.
    Every field of `Sampling` is accepted, but only `logprobs`, `min_tokens`, `stop_token_ids` and
    `ignore_eos` change anything. With `verify_kv` the first decode row of each sequence checks
    every number of its prefix in the pool.
    """

    def __init__(
        self,
        *,
        model: str = "synthetic",
        layers: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        dtype: str = "float16",
        block_tokens: int = 16,
        axes: str = DEFAULT_AXES,
        pool_tokens: int | None = None,
        vocabulary: int | None = None,
        context_tokens: int | None = None,
        max_batch: int = 1024,
        profile: str | None = None,
        model_shape: str | None = None,
        weights: str = "bfloat16",
        devices: int = 1,
        slower: float = 1.0,
        step_seconds: float = 0.0,
        prefill_seconds_per_token: float = 0.0,
        end_tokens: Items[int] = (),
        verify_kv: bool = False,
    ) -> None:
        """Make the pool.

        Raises:
            BackendMisconfigured: names the option that cannot be used.
        """
        if not isinstance(verify_kv, bool):
            raise BackendMisconfigured(f"verify_kv must be true or false; got {verify_kv!r}")
        shape = load_shape(model_shape) if model_shape is not None else None
        given = {
            "layers": layers,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "vocabulary": vocabulary,
            "context_tokens": context_tokens,
        }
        sizes = _sizes(given, shape)
        self._vocabulary = whole("vocabulary", sizes["vocabulary"], 2)
        layout = checked_layout(
            model=f"{model}/{self._vocabulary}",
            weights="synthetic",
            layers=sizes["layers"],
            kv_heads=sizes["kv_heads"],
            head_dim=whole("head_dim", sizes["head_dim"], 8, 4096),
            dtype=dtype,
            block_tokens=block_tokens,
            rope="half",
            axes=axes,
        )
        ends = token_ids("end_tokens", end_tokens, self._vocabulary)
        if len(ends) >= self._vocabulary:
            raise BackendMisconfigured("end_tokens must leave some token of the vocabulary")
        self._timing = read_timing(
            profile, model_shape, None,
            weights=weights, kv_bytes=layout.item_bytes, devices=devices, slower=slower,
        )  # fmt: skip
        tokens = DEFAULT_POOL_TOKENS if pool_tokens is None else pool_tokens
        if self._timing is not None:
            self._timing.check_room("pool_tokens", whole("pool_tokens", tokens, 1))
        self._pace = Pace()
        self.info = BackendInfo(
            layout=layout,
            pool_blocks=blocks_in(tokens, block_tokens),
            vocabulary=self._vocabulary,
            context_tokens=whole("context_tokens", sizes["context_tokens"], 1),
            end_tokens=ends,
            rng="positional",
            continuation="exact",
            sampling=frozenset(Sampling.__struct_fields__),
            max_batch=whole("max_batch", max_batch, 1, 1 << 16),
            emulated=True,
            emulates=self._timing.title if self._timing is not None else "",
        )
        self._step_seconds = seconds("step_seconds", step_seconds)
        self._token_seconds = seconds("prefill_seconds_per_token", prefill_seconds_per_token)
        if self._timing is not None and (step_seconds or prefill_seconds_per_token):
            raise BackendMisconfigured("profile: it says how long steps take: give no `*_seconds*`")
        self._verify = verify_kv
        self.pool: NDArray[np.uint8] = allocate(layout.block_bytes * self.info.pool_blocks)
        self._pattern = Pattern(layout, self.pool, self.info.pool_blocks)
        # Hashes of prompts by the identity of their sequence, which the entry keeps alive.
        self._known: dict[int, tuple[Sequence, int]] = {}

    def step(self, batch: Items[Row], ready: Ready) -> list[Output]:
        """Write the KV of every row, tick, and say the tokens.

        Raises:
            StepFailed: a row is out of range, or a prefix is not what its tokens say.
        """
        if not batch:
            return []
        self._refuse_strange(batch)
        try:
            places = self._pattern.place(batch)
        except IndexError as error:
            raise StepFailed(f"a row's blocks do not cover its positions: {error}") from error
        if self._verify:
            for row in batch:
                self._check(row)
        self._pace.begin(self._lasts(batch))
        chunks = [index for index, row in enumerate(batch) if len(row.tokens) > 1]
        if chunks:
            layers = self.info.layout.layers
            for layer in range(layers):
                self._pattern.write(places, layer)
                self._pace.reach((layer + 1) / layers)
                for index in chunks:
                    ready(index, layer)
        else:
            self._pattern.write(places)
        outputs = self._outputs(batch)
        self._pace.end()
        return outputs

    def ingest(self, blocks: Items[int]) -> None:
        """Nothing to do: the pool is what is computed from."""

    def copy_blocks(self, pairs: Items[tuple[int, int]]) -> None:
        """Copy blocks inside the pool."""
        self._pattern.copy(pairs)

    def close(self) -> None:
        """Forget the sequences; the pool goes with its last reader."""
        self._known.clear()

    # ---- time

    def _lasts(self, batch: Items[Row]) -> float:
        """Seconds that this step takes."""
        if self._timing is not None:
            return self._timing.seconds(batch)
        tokens = sum(len(row.tokens) for row in batch if len(row.tokens) > 1)
        return self._step_seconds + self._token_seconds * tokens

    # ---- tokens

    def _outputs(self, batch: Items[Row]) -> list[Output]:
        sequences = [one for row in batch for one in row.sequences]
        tokens = iter(self._tokens(sequences))
        outputs = []
        for row in batch:
            sampled = tuple([self._sampled(one, next(tokens)) for one in row.sequences])
            if row.prompt_logprobs is None:
                outputs.append(Output(sampled))
            else:
                wanted = row.prompt_logprobs
                prompt = tuple([self._logprob(token, wanted) for token in row.following])
                outputs.append(Output(sampled, prompt))
        return outputs

    def _tokens(self, sequences: list[Sequence]) -> list[int]:
        keys = np.array([self._prompt_hash(one) for one in sequences], np.uint64)
        seeds = np.array([one.seed & MASK for one in sequences], np.uint64)
        positions = np.array([len(one.prompt) + len(one.generated) for one in sequences], np.uint64)
        draws = mix(mix(keys ^ mix(seeds)) + positions)
        tokens: list[int] = (draws % np.uint64(self._vocabulary)).tolist()
        return tokens

    def _prompt_hash(self, sequence: Sequence) -> int:
        known = self._known.get(id(sequence))
        if known is None:
            if len(self._known) >= 4 * self.info.max_batch:
                del self._known[next(iter(self._known))]
            known = sequence, _hash(sequence.prompt)
            self._known[id(sequence)] = known
        return known[1]

    def _sampled(self, sequence: Sequence, token: int) -> Sampled:
        sampling = sequence.sampling
        if sampling.min_tokens > len(sequence.generated):
            ends = () if sampling.ignore_eos else self.info.end_tokens
            banned = {*ends, *sampling.stop_token_ids}
            for _ in range(len(banned)):
                if token not in banned:
                    break
                token = (token + 1) % self._vocabulary
        if sampling.logprobs is None:
            return Sampled(token)
        return Sampled(token, self._logprob(token, sampling.logprobs))

    def _logprob(self, token: int, alternatives: int) -> Logprob:
        """Of a made-up distribution: the token comes first, and the sum stays below 1."""
        count = min(alternatives, self._vocabulary)
        top = [((token + rank) % self._vocabulary, -0.5 - rank) for rank in range(count)]
        return Logprob(token, -0.5, tuple(top))

    # ---- checks

    def _refuse_strange(self, batch: Items[Row]) -> None:
        for number, row in enumerate(batch):
            if not row.tokens or row.start < 0:
                raise StepFailed(f"row {number} has no tokens, or starts before 0")
            if row.start + len(row.tokens) > self.info.context_tokens:
                raise StepFailed(f"row {number} exceeds the context of {self.info.context_tokens}")
            if min(row.tokens) < 0 or max(row.tokens) >= self._vocabulary:
                raise StepFailed(f"row {number} has a token outside the vocabulary")

    def _check(self, row: Row) -> None:
        if len(row.tokens) > 1 or not row.start:
            return
        for sequence in row.sequences:
            if id(sequence) in self._known:
                continue
            prefix = [*sequence.prompt, *sequence.generated][: row.start]
            wrong = self._pattern.first_difference(prefix, row.blocks)
            if wrong is not None:
                position, layer = wrong
                raise StepFailed(
                    f"the KV of position {position} in layer {layer} is not that of its tokens"
                )


MASK = (1 << 64) - 1


def _hash(tokens: list[int]) -> int:
    states = prefix_states(np.array(tokens, np.uint64), 0, 0)
    return int(states[-1]) if len(tokens) else 0


_SIZES = {
    "layers": 2,
    "kv_heads": 2,
    "head_dim": 64,
    "vocabulary": 49152,
    "context_tokens": 8192,
}


def _sizes(given: Mapping[str, int | None], shape: Shape | None) -> dict[str, int]:
    """The sizes of the model: the options', the shape's, or the defaults."""
    sizes: dict[str, int] = {}
    for name, default in _SIZES.items():
        value = given[name]
        if shape is not None and name != "context_tokens" and value is not None:
            raise BackendMisconfigured(f"{name}: `model_shape` says it already")
        sizes[name] = getattr(shape, name, default) if value is None else value
    return sizes
