"""Traffic in the shape of public traces: how long prompts and answers are, and how bursty.

The numbers are quantiles of the traces themselves (0, 5, ... 95 %, then 99, 99.9 and 100 %), taken
from the files named below; prompts and answers are drawn independently, as their lengths are
uncorrelated in all three (|r| < 0.09). `burst` is the coefficient of variation of the rate of
arrivals from one 10 s to the next beyond that of a Poisson process.

* Azure, conversation and code: Patel et al., "Splitwise", ISCA 2024 (CC-BY);
  github.com/Azure/AzurePublicDataset, data/AzureLLMInferenceTrace_{conv,code}.csv
* Mooncake, conversation: Qin et al., "Mooncake", FAST 2025;
  github.com/kvcache-ai/Mooncake, FAST25-release/traces/conversation_trace.jsonl
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

LEVELS = (*(i / 20 for i in range(20)), 0.99, 0.999, 1.0)
PERIOD = 10.0


@dataclass(frozen=True)
class Shape:
    """One kind of traffic. Lengths are tokens."""

    name: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    burst: float

    def lengths(self, rng: random.Random) -> tuple[int, int]:
        """One request's prompt and answer."""
        return _draw(rng, self.prompt), _draw(rng, self.answer)

    def means(self) -> tuple[float, float]:
        """Tokens of the mean prompt and answer."""
        return _mean(self.prompt), _mean(self.answer)


def _draw(rng: random.Random, quantiles: tuple[int, ...]) -> int:
    level = rng.random()
    i = bisect_right(LEVELS, level) - 1
    low, high = quantiles[i], quantiles[i + 1]
    return max(1, round(low + (high - low) * (level - LEVELS[i]) / (LEVELS[i + 1] - LEVELS[i])))


def _mean(quantiles: tuple[int, ...]) -> float:
    pieces = zip(quantiles, quantiles[1:], LEVELS, LEVELS[1:], strict=False)
    return sum((low + high) / 2 * (to - since) for low, high, since, to in pieces)


def arrivals(seed: int, rate: float, burst: float) -> Iterator[float]:
    """Times of arrival: Poisson, at a rate that is drawn anew for each period.

    The same seed has the same good and bad periods, whatever the rate.
    """
    moods, rng = random.Random(f"moods {seed}"), random.Random(f"arrivals {seed}")
    for period in count():
        shape = 1 / burst**2
        now = period * PERIOD
        here = rate * moods.gammavariate(shape, 1 / shape)
        while (now := now + rng.expovariate(max(here, 1e-9))) < (period + 1) * PERIOD:
            yield now


AZURE_CONVERSATION = Shape(
    "Azure conversation",
    prompt=(
        *(2, 181, 207, 372, 387, 396, 403, 414, 703, 984, 1020, 1045, 1071, 1097, 1130, 1189),
        *(1315, 1876, 2734, 4083, 4142, 6179, 14050),
    ),
    answer=(
        *(7, 41, 54, 67, 77, 85, 91, 96, 103, 113, 129, 151, 177, 217, 384, 395, 400, 411, 424),
        *(451, 601, 954, 1000),
    ),
    burst=0.23,
)
AZURE_CODE = Shape(
    "Azure code",
    prompt=(
        *(3, 75, 147, 232, 386, 578, 770, 939, 1075, 1261, 1469, 1690, 1909, 2164, 2433, 2744),
        *(3192, 3920, 5188, 7303, 7436, 7437, 7437),
    ),
    answer=(
        *(6, 6, 7, 7, 8, 9, 9, 10, 11, 12, 13, 14, 16, 18, 20, 24, 29, 39, 55, 90, 251, 825, 1899),
    ),
    burst=1.66,
)
MOONCAKE_CONVERSATION = Shape(
    "Mooncake conversation",
    prompt=(
        *(891, 901, 964, 1261, 1662, 2306, 3263, 4251, 4993, 5870, 6909, 8187, 9570, 11238),
        *(13196, 15367, 17869, 21464, 27367, 39550, 85400, 121301, 126195),
    ),
    answer=(
        *(1, 10, 24, 46, 100, 156, 213, 256, 291, 322, 350, 375, 399, 423, 447, 472, 504, 543),
        *(597, 698, 1119, 2000, 2000),
    ),
    burst=0.18,
)
SHAPES = (AZURE_CONVERSATION, AZURE_CODE, MOONCAKE_CONVERSATION)
