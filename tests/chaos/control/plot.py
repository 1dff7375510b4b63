"""What may happen to a request: the points it passes, the faults that strike, how it ends."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from tests.chaos.coverage import Excuse
from tests.chaos.schedule import Approach

LEASE_SECONDS = 3.0
LANDING_SECONDS = 2.0
COMMIT_SECONDS = 2.0
SILENCE_SECONDS = 3.0
WORKER_WAIT_SECONDS = 6.0
OUTAGE_SECONDS = 2.0
REDIS_TIMEOUT_SECONDS = 1.6
DEADLINE_SECONDS = 25.0
LIMIT_SECONDS = 90.0
LONG_SECONDS = 4.0
RESTART_SECONDS = 1.5
DRAIN_SECONDS = 0.5
GIVE_BACK_SECONDS = 5.0
"""How long it may take at most that what a worker had to give back is over."""

MAX_RETRIES = 3

GATEWAYS = ("g0", "g1")
PREFILLS = ("p0", "p1")
DECODES = ("d0", "d1")
REDIS = "redis"

STATES = ("queued", "placed", "prefilling", "handing_over", "decoding", "behind", "over")
"""Where the request's gateway says it is. `over`: it has not come, has ended, or that gateway is
dead. `behind`: a worker goes on with what its gateway has left behind, in whatever state that is.
"""

POOL_BLOCKS = {"prefill": 16, "decode": 18}
OFFERS = {"prefill": (20, 0), "decode": (0, 84)}
"""What a worker publishes, in prompt tokens and tokens of decode KV: too little for all at once,
and more than fits when answers get longer than they were expected to be.
"""

QUIET_SECONDS = 9.0
"""Within that time of the last client's end and of whatever struck, nothing may be left: a lease,
and the grace that everybody has after an outage of Redis.
"""

CANCEL_SECONDS = 0.15
"""How long a worker may compute for somebody who has gone, while nothing holds the news up."""

KEEP_SECONDS = 2.0
"""How long workers keep what nobody owns."""

LONG_TOKENS = 48
"""What a few ask for: enough to be gone in the middle of it."""

SERVING_SECONDS = 1.0
"""Likewise when nothing struck."""

WORLD = (
    "leave",
    "kill gateway",
    "kill prefill",
    "kill decode",
    "kill redis",
    "stop gateway",
    "stop prefill",
    "stop decode",
    "stop redis",
    "part control",
    "part data",
    "part redis",
    "cut control",
    "cut data",
    "cut redis",
    "slow",
)
"""What happens to clients, processes and lines, whatever is under way."""

WEAR = ("drain prefill", "drain decode", "fail prefill", "fail decode", "rot")
"""What happens to workers that are there: they drain, their steps fail for a while, and what they
keep for later prefixes changes.
"""

HARMLESS = frozenset({"again", "rot", "leave"})
"""What holds up nobody else."""

RARE = ("delay", "leave", "kill gateway", "kill decode", "kill redis")
"""What strikes where requests seldom come: when a worker was fuller than it had seemed."""

MENU = {
    "post": ("delay", *WORLD),
    "enqueue": ("delay", *WORLD),
    "requeue": RARE,
    "leave": ("delay", *WORLD),
    "grant": ("drop", "delay", "again", *WORLD, *WEAR),
    "Reserve": ("delay", *WORLD),
    "Granted": ("delay", *WORLD),
    "Refused": RARE,
    "Prefill": ("delay", *WORLD, *WEAR),
    "compute": (*WORLD, *WEAR),
    "FirstToken": ("delay", "again", *WORLD),
    "open": ("delay", "stale", *WORLD),
    "write": ("delay", "corrupt", *WORLD),
    "commit": ("delay", "corrupt", *WORLD),
    "answer": ("delay", *WORLD),
    "HandedOver": ("delay", *WORLD),
    "Landed": ("delay", *WORLD),
    "step": (*WORLD, *WEAR),
    "Tokens": ("delay", "again", *WORLD),
    "Failed": ("delay", *WORLD),
    "Cancel": ("delay", "again", *WORLD),
    "token": ("delay", *WORLD),
    "end": ("delay", *WORLD),
}
"""Where what may strike. A point is passed when that message leaves, or that is being computed:
`enqueue`, `requeue` and `leave` when Redis has carried the script out and has not answered,
`compute` in the middle of a prefill step, `step` in the middle of a decode step.
"""

_HELD_UP = ("slow", "delay", "stop gateway", "part control")
_REDIS = tuple(it for it in WORLD if it.endswith("redis"))
_DRAINS = ("drain prefill", "drain decode")
_FAILS = ("fail prefill", "fail decode")
_WORKERS = tuple(it for it in WORLD if it.endswith(("prefill", "decode", "control", "data")))

CAUSES: Mapping[str, Sequence[str]] = defaultdict(
    tuple,
    {
        "left": ("leave",),
        "broken": ("kill gateway",),
        "unreachable": ("kill gateway",),
        "RequestUnknown": ("kill redis",),
        "ContinuationLost": (*_WORKERS, *_DRAINS, *_FAILS),
        "QueueUnavailable": (*_REDIS, *_HELD_UP),
        "NoWorkers": (*_REDIS, *_WORKERS, *_HELD_UP, *_DRAINS, *_FAILS),
        "WorkerFailed": (*_WORKERS, *_HELD_UP, *_FAILS, "corrupt", "stale"),
    },
)
"""What must have struck when a request ends in a way that is not `done`: nothing else is a reason.
For a deadline that was not short there is only one: never was there calm for `QUIET_SECONDS`.
"""

LATE = frozenset({"DeadlineExceeded", "RequestUnknown"})
"""How a request with a short deadline may end; its record is gone soon after that."""

LEAST = {"WorkerFailed": MAX_RETRIES + 1}
"""How many of them, if not one: a worker's death costs time."""

_LASTING = ("stop prefill", "stop decode", "part control", "part data")
WEIGHT = dict.fromkeys(_LASTING, 2) | dict.fromkeys(_FAILS, MAX_RETRIES + 1)
"""How many failures one fault may make, if not one: what lasts outlives a landing, whose worker is
tried again, and then its worker's silence is noticed.
"""

OWN: Mapping[str, tuple[str, ...]] = {
    "post": ("over",),
    "enqueue": ("queued",),
    "requeue": ("queued",),
    "leave": ("over",),
    "grant": ("queued",),
    "Reserve": ("placed",),
    "Granted": ("placed", "behind"),
    "Refused": ("placed",),
    "Prefill": ("prefilling",),
    "compute": ("prefilling", "behind"),
    "FirstToken": ("prefilling", "behind"),
    "open": ("prefilling", "behind"),
    "write": ("prefilling", "behind"),
    "commit": ("prefilling", "behind"),
    "answer": ("prefilling", "handing_over", "behind"),
    "HandedOver": ("prefilling", "handing_over", "decoding", "behind"),
    "Landed": ("prefilling", "handing_over", "behind"),
    "step": ("prefilling", "handing_over", "decoding", "behind"),
    "Tokens": ("prefilling", "handing_over", "decoding", "behind"),
    "Failed": ("prefilling", "handing_over", "behind"),
    "Cancel": ("placed", "prefilling", "handing_over", "decoding"),
    "token": ("handing_over", "decoding"),
    "end": ("over",),
}
"""The states in which a request may be at a point; any other one counts as the last of them."""


def state_at(point: str, state: str) -> str:
    """A state as it is counted at that point."""
    own = OWN[point]
    return state if state in own else own[-1]


LEFT_BEHIND = ("FirstToken", "commit", "answer", "Landed", "HandedOver", "step", "Tokens")

_HELD = (("compute", 1, "part control", 0.25), ("compute", 1, "part control", 0.24))
"""No cancel reaches either worker for two seconds."""

APPROACHES = (
    *[Approach((), (("Refused", 1), ("requeue", 1)))] * 8,
    *[Approach((("Reserve", 1, "leave", 0.0),), (("Granted", 1),))] * 2,
    *[Approach((("Prefill", 1, "leave", 0.0),), (("compute", 1),))] * 6,
    *[Approach((), (("grant", 1),))] * 3,
    *[
        Approach((("Prefill", 1, "delay", 0.05), ("Prefill", 1, "leave", 0.0)), (("open", 1),)),
    ]
    * 3,
    *[Approach((("compute", 1, "kill gateway", 0.5),), (("write", 1),))] * 2,
    *[
        Approach(
            (*_HELD, ("compute", 1, "leave", 0.0)),
            tuple((point, 1) for point in LEFT_BEHIND),
        )
    ]
    * 2,
    *[Approach((("FirstToken", 1, "delay", 0.3),), (("step", 1), ("Tokens", 1), ("answer", 1)))]
    * 2,
    Approach((("FirstToken", 1, "delay", 0.3),), (("HandedOver", 1), ("Landed", 1))),
    Approach((("write", 1, "corrupt", 0.5), ("FirstToken", 1, "delay", 0.1)), (("Failed", 1),)),
    Approach((("commit", 1, "corrupt", 0.5),), (("Failed", 1),)),
    Approach((("Landed", 1, "delay", 0.3),), (("step", 1), ("Tokens", 1))),
    Approach((*_HELD, ("write", 1, "corrupt", 0.5), ("commit", 1, "leave", 0.0)), (("Failed", 1),)),
    Approach((("HandedOver", 1, "delay", 0.02),), (("Tokens", 1), ("token", 2), ("Cancel", 1))),
)
"""Ways into states that chance alone finds rarely; those that often miss are there repeatedly."""

EXCUSES = tuple(
    Excuse(
        f"{point}: any other state counts as {own[-1]}",
        (point,),
        tuple(state for state in STATES if state not in own),
    )
    for point, own in OWN.items()
)
"""Why the other combinations cannot occur."""
