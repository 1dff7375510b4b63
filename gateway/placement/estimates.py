"""Learn from what requests took how long the next ones will take.

Recursive least squares with forgetting, on relative errors, so that short prompts count like long
ones. Pure arithmetic: no clock, no I/O, the same numbers from the same history. What is no
duration is left out, and no measurement, however wrong, moves a prediction by more than a bounded
part of it. A worker that has changed is followed all the same: several errors in a row beyond
belief, all to one side, and what was learnt is doubted again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from gateway.placement.costs import LinkCost, PrefillCost, StepCost

FORGET = 0.98
SHORTEST_SECONDS, LONGEST_SECONDS = 1e-9, 3600.0
ENOUGH = 8
LEAST_CREDIBLE = 0.3
"""Relative errors below this are never cut off."""
CHANGED = 6
"""So many large errors in a row, all to the same side, are no accident."""
KILO, MEGA = 1e3, 1e6

Vector = list[float]


class Fit:
    """seconds = weights . features, all weights at least 0.

    `prior` are the weights before anything was measured, `doubt` how far off each may be.
    """

    def __init__(self, prior: Sequence[float], doubt: Sequence[float]) -> None:
        self.weights = list(prior)
        self.count = 0
        self._most = [it * it for it in doubt]
        self._begin_again()

    def _begin_again(self) -> None:
        size = range(len(self._most))
        self._doubt = [[self._most[i] * (i == j) for j in size] for i in size]
        self._spread = 1.0
        self._strays = 0

    def predict(self, features: Sequence[float]) -> float:
        """Seconds for these features."""
        return sum(w * x for w, x in zip(self.weights, features, strict=True))

    def observe(self, features: Sequence[float], seconds: float) -> None:
        """It took `seconds`; ignored when nothing can have taken that long."""
        if not SHORTEST_SECONDS <= seconds <= LONGEST_SECONDS:  # NaN is not, either
            return
        self.count += 1
        expected = max(self.predict(features), 1e-9)
        relative = [x / expected for x in features]
        told = math.log(seconds / expected)
        credible = self._credible(told)
        error = math.expm1(credible)
        spread = [_dot(row, relative) for row in self._doubt]
        scale = FORGET + _dot(spread, relative)
        self.weights = [w + s / scale * error for w, s in zip(self.weights, spread, strict=True)]
        if credible == told:  # what was not believed leaves as much doubt as there was
            self._narrow(spread, scale)
        self._keep_positive()

    def _keep_positive(self) -> None:
        """Raise weights below 0 to it, and move the others as what is known of all of them says."""
        for _ in self.weights:
            i = min(range(len(self.weights)), key=self.weights.__getitem__)
            short = -self.weights[i]
            if short <= 0:
                return
            for j, doubt in enumerate(self._doubt[i]):
                self.weights[j] += doubt / self._doubt[i][i] * short
        self.weights = [max(0.0, weight) for weight in self.weights]

    def _credible(self, error: float) -> float:
        """As much of an error as is believed; errors are logarithms of ratios."""
        limit = max(3 * self._spread, LEAST_CREDIBLE)
        if abs(error) <= max(self._spread, LEAST_CREDIBLE):
            self._strays = 0
        else:
            side = 1 if error > 0 else -1
            self._strays = self._strays + side if self._strays * side > 0 else side
            if abs(self._strays) >= CHANGED:
                self._begin_again()
                limit = 3.0
        error = min(max(error, -limit), limit)
        self._spread += 0.1 * (abs(error) - self._spread)
        return error

    def _narrow(self, spread: Vector, scale: float) -> None:
        """Doubt shrinks along what was measured and grows elsewhere, but never past its start."""
        size = range(len(spread))
        self._doubt = [
            [(self._doubt[i][j] - spread[i] * spread[j] / scale) / FORGET for j in size]
            for i in size
        ]
        for i in size:
            if self._doubt[i][i] > self._most[i]:
                shrink = math.sqrt(self._most[i] / self._doubt[i][i])
                for j in size:
                    self._doubt[i][j] *= shrink
                    self._doubt[j][i] *= shrink


class Work(NamedTuple):
    """Prompts that were prefilled together: how many, and sums over their tokens.

    Each has tokens behind those that were cached; `squares` sums up the differences of squares.
    """

    prompts: int = 0
    tokens: int = 0
    squares: int = 0

    def and_prompt(self, tokens: int, cached: int = 0) -> Work:
        """This and another prompt, of so many tokens, the cached ones included."""
        fresh = tokens - cached
        squares = (tokens + cached) * fresh
        return Work(self.prompts + 1, self.tokens + fresh, self.squares + squares)


class Estimates:
    """What is known of every worker and pair, by the ids that the caller gives them."""

    def __init__(self) -> None:
        self._prefill: dict[str, Fit] = {}
        self._step: dict[str, Fit] = {}
        self._link: dict[tuple[str, str], Fit] = {}

    # ---- what was measured

    def prefilled(self, worker: str, work: Work, seconds: float) -> None:
        """All of `work` took so long, waiting not counted."""
        features = (float(work.prompts), work.tokens / KILO, work.squares / MEGA)
        self._of_prefill(worker).observe(features, seconds)

    def stepped(self, worker: str, sequences: float, context: float, seconds: float) -> None:
        """A decode step of so many sequences, with so much context in all, took so long."""
        self._of_step(worker).observe((1.0, sequences, context / KILO), seconds)

    def moved(self, prefill: str, decode: str, count: int, seconds: float) -> None:
        """The decode worker waited so long for `count` bytes once prefill was over."""
        fit = self._link.setdefault((prefill, decode), _link_fit())
        fit.observe((1.0, count / MEGA), seconds)

    def forget(self, worker: str) -> None:
        """The worker is gone; another start of it may be another machine."""
        self._prefill.pop(worker, None)
        self._step.pop(worker, None)
        for pair in [pair for pair in self._link if worker in pair]:
            del self._link[pair]

    # ---- what is believed

    def prefill(self, worker: str) -> PrefillCost:
        """What prefilling costs on that worker."""
        fit = self._prefill.get(worker)
        if fit is None:
            return PrefillCost()
        base, linear, square = fit.weights
        return PrefillCost(base, linear / KILO, square / MEGA, fit.count >= ENOUGH)

    def step(self, worker: str) -> StepCost:
        """What a decode step costs on that worker."""
        fit = self._step.get(worker)
        if fit is None:
            return StepCost()
        base, row, context = fit.weights
        return StepCost(base, row, context / KILO, fit.count >= ENOUGH)

    def link(self, prefill: str, decode: str) -> LinkCost:
        """What handing over costs between these two."""
        fit = self._link.get((prefill, decode))
        if fit is None:
            return LinkCost()
        base, byte = fit.weights
        return LinkCost(base, byte / MEGA, fit.count >= ENOUGH)

    def _of_prefill(self, worker: str) -> Fit:
        prior = PrefillCost()
        weights = (prior.base, prior.linear * KILO, prior.square * MEGA)
        return self._prefill.setdefault(worker, Fit(weights, (0.1, 2.0, 0.05)))

    def _of_step(self, worker: str) -> Fit:
        prior = StepCost()
        weights = (prior.base, prior.row, prior.context * KILO)
        return self._step.setdefault(worker, Fit(weights, (0.2, 5e-3, 1e-3)))


def _link_fit() -> Fit:
    prior = LinkCost()
    return Fit((prior.base, prior.byte * MEGA), (0.3, 0.03))


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
