"""What is wanted of Baton, as ratios to what was measured beside it in the same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import msgspec

from tests.bench.transfer.cases import LLAMA, SMOL, Case, Shape

LARGE_BYTES = 64_000_000

Speeds = Mapping[str, float]
"""GB/s by contender."""


class Aim(msgspec.Struct, frozen=True):
    """`who` shall reach `share` of `of`, or `share` GB/s where `of` is empty, in some cases.

    Of several in `of`, the fastest that took part counts.
    """

    who: str
    share: float
    of: tuple[str, ...]
    holds: Callable[[Case], bool]

    def judge(self, speeds: Speeds) -> str:
        """`0.85 of bare socket (aim 0.8: met)`; empty where either did not take part."""
        beside = [it for it in self.of if it in speeds]
        if self.who not in speeds or (self.of and not beside):
            return ""
        best = max(beside, key=lambda it: speeds[it]) if beside else ""
        found = speeds[self.who] / (speeds[best] if best else 1.0)
        what = f"of {best}" if best else "GB/s"
        verdict = "met" if found >= self.share else "MISSED"
        return f"{found:.2f} {what} (aim {self.share:g}: {verdict})"


def _large(case: Case) -> bool:
    return case.kind == "equal" and case.size >= LARGE_BYTES


def _one_megabyte(case: Case) -> bool:
    return case.kind == "equal" and case.size < 2_000_000


def _paged(case: Case) -> bool:
    return case.kind == "equal"


def _paged_as(shape: Shape, case: Case) -> bool:
    return _paged(case) and case.shape == shape


def _in_order(case: Case) -> bool:
    return case.kind == "in order"


def _converted(case: Case) -> bool:
    return not case.alike


def _long_runs(case: Case) -> bool:
    return case.kind == "regrouped"


def _short_runs(case: Case) -> bool:
    return case.kind == "unequal"


BARE = ("bare socket",)
AIMS = (
    Aim("Baton tcp, no digest", 0.9, BARE, _large),
    Aim("Baton tcp", 0.8, BARE, _large),
    Aim("Baton tcp", 0.6, BARE, _one_megabyte),
    Aim("Baton tcp", 0.7, BARE, _converted),
    *(
        Aim("Baton tcp", share, (nixl,), partial(_paged_as, shape))
        for nixl in ("NIXL over TCP", "NIXL over TCP, polled")
        for shape, share in ((SMOL, 4.0), (LLAMA, 1.5))
    ),
    Aim("Baton shm, no digest", 12.0, (), _in_order),
    Aim("Baton shm, no digest", 0.8, ("memcpy",), _paged),
    Aim("Baton, conversion", 0.8, ("numpy", "torch"), _short_runs),
    Aim("Baton, conversion", 0.5, ("memcpy",), _long_runs),
)


DIGEST_PASSES = 2.0
"""The digest may read the bytes once on either side."""


def judge(case: Case, who: str, speeds: Speeds) -> str:
    """All that is said of one contender in one case."""
    said = [aim.judge(speeds) for aim in AIMS if aim.who == who and aim.holds(case)]
    return "; ".join(filter(None, [*said, _digest_of(who, speeds)]))


def _digest_of(who: str, speeds: Speeds) -> str:
    """What the digest adds to a transfer, in passes over the bytes at the speed of reading."""
    without = f"{who}, no digest"
    if without not in speeds or "read" not in speeds:
        return ""
    passes = (1 / speeds[who] - 1 / speeds[without]) * speeds["read"]
    if who == "Baton tcp":
        return f"digest {passes:.1f} read passes"
    verdict = "met" if passes <= DIGEST_PASSES else "MISSED"
    return f"digest {passes:.1f} read passes (aim at most {DIGEST_PASSES:g}: {verdict})"
