"""What placement looks at, what it is asked for, and what it answers.

Seconds and tokens throughout; `inf` where there is no limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from math import inf
from typing import Literal

import msgspec

from backends.protocol import BackendInfo, Role, Sampling
from gateway.placement.costs import STEP_TOKENS, LinkCost, PrefillCost, StepCost


class WorkerView(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one connected worker, with all that has been booked on it.

    `queued_tokens` wait for prefill there, which will take `queued_seconds`. `running` sequences
    are decoded there or will be, looking back on `context` tokens in all. `kept` are the marks of
    the prefixes whose KV it keeps (`backends.chain`), as far as it has said so.
    `left_alone` says why it has failed too often to be given work for the time being.
    """

    id: str
    role: Role
    info: BackendInfo
    queued_tokens: int
    running: int
    free_blocks: int
    queued_seconds: float = 0.0
    context: int = 0
    draining: bool = False
    left_alone: str = ""
    step_tokens: int = STEP_TOKENS
    prefill: PrefillCost = PrefillCost()
    step: StepCost = StepCost()
    kept: AbstractSet[int] = frozenset()


class LinkView(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the way between a pair. `queued_seconds` are booked on it already."""

    cost: LinkCost = LinkCost()
    queued_seconds: float = 0.0


class Snapshot(msgspec.Struct, frozen=True):
    """The connected workers, and the pairs of ids that have met and can hand over.

    `left_alone` says of other pairs why they are not among them for the time being.
    """

    workers: tuple[WorkerView, ...]
    pairs: frozenset[tuple[str, str]]
    links: Mapping[tuple[str, str], LinkView] = {}
    left_alone: Mapping[tuple[str, str], str] = {}


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be placed: a prefix of `tokens` tokens for `sequences` sequences.

    About `expected` tokens will be generated for each. The first one must be there within
    `first_token_seconds`, or nobody needs it; the gaps between tokens should be within
    `gap_seconds`. `decodes` is false when the first token is all that is wanted. `prompt_logprobs`
    says that the prompt's own tokens are to be scored. `marks` are those of the prefix's own
    prefixes, shortest first, by the fingerprint of the layout.
    """

    tokens: int
    sequences: int
    sampling: Sampling
    expected: int = 0
    first_token_seconds: float = inf
    gap_seconds: float = inf
    decodes: bool = True
    prompt_logprobs: bool = False
    avoid: frozenset[str] = frozenset()
    marks: Mapping[str, tuple[int, ...]] = {}


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """What a placement is predicted to give, in seconds.

    `first_token` after `wait` and prefill, of which the rows of others in its steps take
    `beside`; `handoff` is what the second one waits for beyond a step; `gap` lies between all
    others. Sequences that are decoded on the same worker lose `delay` in all. `cached` tokens
    need no computing, `moved` bytes travel.
    """

    first_token: float
    wait: float
    beside: float
    handoff: float
    gap: float
    delay: float
    cached: int = 0
    moved: int = 0

    def cost(self, expected: int) -> float:
        """Until the last token is there, and what that takes from others."""
        return self.first_token + self.handoff + self.gap * expected + self.delay


class Candidate(msgspec.Struct, frozen=True):
    """A way that was possible. `short` says which limit it was predicted to miss, if any."""

    prefill: str
    decode: str | None
    forecast: Forecast
    short: str = ""


class Reason(msgspec.Struct, frozen=True):
    """Why a placement is as it is: the best candidates, best first, and who was left out."""

    summary: str
    candidates: tuple[Candidate, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()


class Placement(msgspec.Struct, frozen=True):
    """Where a prefix goes. `decode` is None when `prefill` does all that is left."""

    prefill: str
    decode: str | None
    forecast: Forecast
    reason: Reason


class Unplaceable(msgspec.Struct, frozen=True):
    """Why nothing can be chosen. `field` is set when the request itself is the reason.

    `absent`: no worker is there for it; `full`: there is no room now; `late`: its first token
    cannot be there in time, wherever it goes.
    """

    reason: str
    field: str | None = None
    kind: Literal["absent", "full", "late"] = "absent"
    left_out: tuple[tuple[str, str], ...] = ()
