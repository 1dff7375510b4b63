"""How long prompts and answers are: distributions that a command line can name.

`fixed:N`, `uniform:LOW:HIGH`, `exponential:MEAN`, or `lognormal:MEDIAN:SIGMA`, which is what
chats look like. Drawn lengths are whole and at least 1.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import NamedTuple

LONGEST = 1_000_000


class Shape(NamedTuple):
    """A kind of distribution: the names of its numbers, and how it is drawn."""

    parameters: tuple[str, ...]
    draw: Callable[..., float]


SHAPES: Mapping[str, Shape] = {
    "fixed": Shape(("N",), lambda rng, n: n),
    "uniform": Shape(("LOW", "HIGH"), lambda rng, low, high: rng.uniform(low, high)),
    "exponential": Shape(("MEAN",), lambda rng, mean: rng.expovariate(1 / mean)),
    "lognormal": Shape(
        ("MEDIAN", "SIGMA"), lambda rng, median, sigma: rng.lognormvariate(math.log(median), sigma)
    ),
}


class Lengths:
    """A distribution of lengths, as `text` describes it.

    Raises:
        ValueError: `text` describes none; says what is wrong.
    """

    def __init__(self, text: str) -> None:
        name, *words = text.split(":")
        known = ", ".join(":".join([n, *shape.parameters]) for n, shape in SHAPES.items())
        if name not in SHAPES:
            raise ValueError(f"{text!r}: expected one of {known}")
        shape = SHAPES[name]
        try:
            self._numbers = [float(word) for word in words]
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}") from error
        if len(self._numbers) != len(shape.parameters):
            raise ValueError(f"{text!r}: expected {':'.join([name, *shape.parameters])}")
        if not all(0 < number <= LONGEST for number in self._numbers):
            raise ValueError(f"{text!r}: every number must be above 0 and at most {LONGEST}")
        self._draw = shape.draw

    def draw(self, rng: random.Random) -> int:
        """One length."""
        return min(LONGEST, max(1, round(self._draw(rng, *self._numbers))))
