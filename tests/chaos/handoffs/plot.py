"""What may happen to a handoff: the points it passes, the faults that strike, how it ends.

    granted -> written -> verifying -> admitted -> finished
       |          |           |
       +----------+-----------+------> quarantined -> freed      (dead: its worker is)
"""

from __future__ import annotations

from tests.chaos.coverage import Excuse
from tests.chaos.schedule import Approach

LEASE_SECONDS = 1.0
COMMIT_SECONDS = 0.9
STALL_SECONDS = 0.5
DEADLINE_SECONDS = 8.0
LIMIT_SECONDS = 60.0

LONG_WAYS = frozenset({"open", "write", "frame", "commit", "verify", "verified", "answer", "abort"})

SOURCE_BLOCKS = 10
TARGET_BLOCKS = 16
RAILS = 2
"""Receivers of each decode worker: a sender may use any of them."""

STATES = ("granted", "written", "verifying", "admitted", "finished", "quarantined", "freed", "dead")

WORLD = (
    "cancel",
    "stop",
    "cut",
    "kill sender",
    "kill receiver",
    "partition out",
    "partition back",
)
"""What happens to workers and lines, whatever is under way."""

MENU = {
    "grant": WORLD,
    "open": ("drop", "delay", "duplicate", "truncate", "corrupt", *WORLD),
    "compute": WORLD,
    "write": ("drop", "delay", "duplicate", "truncate", "corrupt", "reorder", "late", *WORLD),
    "flight": WORLD,
    "commit": ("drop", "delay", "duplicate", "truncate", "corrupt", "replay", *WORLD),
    "verify": WORLD,
    "answer": ("drop", "delay", "truncate", "corrupt", *WORLD),
    "abort": ("drop", "delay", "duplicate", "truncate", "corrupt", *WORLD),
    "quiesce": WORLD,
    "decode": WORLD,
}
"""Where what may strike.

`grant` is passed when the landing is on its way to the prefill worker, `compute` before each
slice is computed, `flight` while a frame is between its posting and its landing, `quiesce` when a
quarantine begins to wait, `decode` while admitted sequences run; the others are the messages.
`late` delivers a write after the landing has ended; `replay` commits with the digest of another
landing; `reorder` lets later writes and the commit overtake a write.
"""

TOLD_DECODE = ("cancel", 0.05)
TOLD_PREFILL = ("cancel", 0.95)
KEPT_BACK = ("late", 0.1)


def _kept_back(nth: int, *then: tuple[str, int]) -> Approach:
    """The `nth` write is under way, unknown to its sender, when the landing is withdrawn."""
    return Approach((("write", nth, *KEPT_BACK), ("flight", nth, *TOLD_DECODE)), then)


APPROACHES = (
    _kept_back(1, ("compute", 2), ("write", 2), ("abort", 1), ("quiesce", 1)),
    _kept_back(2, ("compute", 3), ("write", 3), ("commit", 1), ("abort", 1)),
    _kept_back(4, ("commit", 1), ("abort", 1)),
    Approach((("grant", 1, *TOLD_DECODE),), (("open", 1), ("write", 1))),
    Approach((("compute", 2, *TOLD_DECODE),), (("write", 2), ("commit", 1))),
    Approach((("flight", 2, *TOLD_DECODE),), (("commit", 1), ("compute", 3), ("flight", 3))),
    Approach((("flight", 4, *TOLD_DECODE),), (("commit", 1),)),
    Approach((("commit", 1, *TOLD_DECODE),), (("verify", 1), ("answer", 1))),
    Approach((("verify", 1, *TOLD_PREFILL),), (("abort", 1),)),
    Approach((("flight", 1, "kill receiver", 0.5),), (("flight", 2), ("write", 2), ("abort", 1))),
    Approach((("flight", 2, "kill receiver", 0.5),), (("flight", 3), ("commit", 1))),
    Approach((("flight", 4, "kill receiver", 0.5),), (("commit", 1),)),
    Approach((("commit", 1, "kill receiver", 0.5),), (("verify", 1), ("answer", 1))),
    Approach((("open", 1, "corrupt", 0.1),), (("write", 1), ("abort", 1))),
)
"""Ways into states that chance alone finds rarely."""

EXCUSES: tuple[Excuse, ...] = ()
