"""How long a step would take on an accelerator, by what it computes and what it reads.

The parts of a step run one after the other; each takes as long as its arithmetic or its reading,
whichever is longer. The matrices of all layers are read once for the whole batch, a sequence's KV
once for all of its rows' tokens; activations are not counted. Pure; nothing here keeps time.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from backends.emulation.profile import WEIGHT_BYTES, Profile, Shape, Weights
from backends.errors import BackendMisconfigured

_EXCHANGES = 2
"""In each layer: after attention, and after the feed-forward part."""


class Span(msgspec.Struct, frozen=True, array_like=True):
    """Positions `start` to `end` of one sequence, of which `sampled` need logits."""

    start: int
    end: int
    sampled: int = 0


class Roofline:
    """`devices` accelerators of one profile, with a model of `shape` spread evenly over them.

    `weights` is the dtype of its matrices, in which the device multiplies; `kv_bytes` is the size
    of one number of KV.
    """

    def __init__(
        self, profile: Profile, shape: Shape, *, weights: Weights, kv_bytes: int, devices: int = 1
    ) -> None:
        """Combine them.

        Raises:
            BackendMisconfigured: the profile does not say how fast it is in `weights`.
        """
        if weights not in profile.flops:
            known = ", ".join(sorted(profile.flops))
            raise BackendMisconfigured(f"weights: {profile.name} has figures for {known} only")
        self.profile = profile
        self.shape = shape
        self.devices = devices
        peak = profile.flops[weights].value * devices
        self._flops = peak * profile.flops_efficiency.value
        rate = profile.memory_bytes_per_second.value * devices
        self._rate = rate * profile.memory_efficiency.value
        self._layer_bytes = shape.layer_weights * WEIGHT_BYTES[weights]
        self._head_bytes = shape.head_weights * WEIGHT_BYTES[weights]
        self._weight_bytes = shape.weights * WEIGHT_BYTES[weights]
        exchange = _EXCHANGES * profile.exchange_seconds.value if devices > 1 else 0.0
        self._fixed = profile.step_seconds.value
        self._fixed += shape.layers * (profile.layer_seconds.value + exchange)
        self.kv_token_bytes = shape.kv_numbers * kv_bytes

    def step_seconds(self, spans: Iterable[Span]) -> float:
        """One step over a batch of rows."""
        shape = self.shape
        tokens = sampled = pairs = read = 0
        for span in spans:
            count = span.end - span.start
            tokens += count
            sampled += span.sampled
            pairs += count * span.start + count * (count + 1) // 2
            read += span.end + count
        seconds = self._fixed
        seconds += self._part(
            2 * tokens * shape.layer_weights * shape.layers, self._layer_bytes * shape.layers
        )
        seconds += self._part(
            4 * pairs * shape.heads * shape.head_dim * shape.layers, read * self.kv_token_bytes
        )
        if sampled:
            seconds += self._part(2 * sampled * shape.head_weights, self._head_bytes)
        return seconds

    def prefill_seconds(self, tokens: int, chunk: int) -> float:
        """A prompt of `tokens`, alone, in steps of at most `chunk`."""
        starts = range(0, tokens, chunk)
        ends = [min(tokens, start + chunk) for start in starts]
        spans = (Span(start, end, end == tokens) for start, end in zip(starts, ends, strict=True))
        return sum(self.step_seconds([span]) for span in spans)

    def decode_seconds(self, batch: int, context: int) -> float:
        """One token for each of `batch` sequences that look back on `context` tokens."""
        return self.step_seconds([Span(context, context + 1, 1)] * batch)

    def handoff_seconds(self, tokens: int) -> float:
        """The KV of `tokens` over the link, the devices' links side by side."""
        rate = self.profile.link_bytes_per_second.value * self.profile.link_efficiency.value
        return tokens * self.kv_token_bytes / (rate * self.devices)

    @property
    def pool_tokens(self) -> int:
        """How many tokens of KV fit beside the weights; 0 or less: the weights do not fit."""
        usable = self.profile.memory_bytes.value * self.devices * self.profile.memory_usable.value
        return int((usable - self._weight_bytes) // self.kv_token_bytes)

    @property
    def title(self) -> str:
        """What is emulated, in a few words."""
        return f"{self.devices} x {self.profile.name}" if self.devices > 1 else self.profile.name

    def _part(self, operations: float, read_bytes: float) -> float:
        return max(operations / self._flops, read_bytes / self._rate)
