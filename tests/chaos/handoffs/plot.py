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

LONG_WAYS = frozenset({"open", "write", "frame", "commit", "verify", "answer", "abort"})

SOURCE_BLOCKS = 10
TARGET_BLOCKS = 16
CAP_BLOCKS = 8
"""What one prefill worker may be able to write to; no prefix takes more than five."""
RAILS = 2
"""Receivers of each decode worker: a sender may use any of them."""

STATES = ("granted", "written", "verifying", "admitted", "finished", "quarantined", "freed", "dead")

WORLD = (
    "cancel",
    "stop",
    "stall",
    "cut",
    "kill sender",
    "kill receiver",
    "partition out",
    "partition back",
)
"""What happens to workers and lines, whatever is under way."""

MENU = {
    "grant": WORLD,
    "open": ("drop", "delay", "duplicate", "truncate", "corrupt", "rival", *WORLD),
    "compute": WORLD,
    "write": (
        "drop",
        "delay",
        "duplicate",
        "truncate",
        "corrupt",
        "reorder",
        "late",
        "rival",
        *WORLD,
    ),
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
landing; `reorder` lets later writes and the commit overtake a write. A `rival` is another worker
that writes the same prefix into the same landing, before this one or beside it. A sender that is
stalled acknowledges nothing any more, and what it has under way lands when it likes, until it is
killed.
"""

TOLD_DECODE = ("cancel", 0.01)
TOLD_DECODE_LATER = ("cancel", 0.1)
TOLD_PREFILL = ("cancel", 0.99)
KEPT_BACK = ("late", 0.1)
DELAYED = ("delay", 0.9)
STALLED = ("stall", 0.5)
KILLED = ("kill receiver", 0.5)


def _kept_back(nth: int, *then: tuple[str, int]) -> Approach:
    """The `nth` write is under way, unknown to its sender, when the landing is withdrawn."""
    return Approach((("write", nth, *KEPT_BACK), ("flight", nth, *TOLD_DECODE)), then)


APPROACHES = (
    *[_kept_back(1, ("compute", 3))] * 3,  # many prompts have no third slice
    _kept_back(1, ("write", 2), ("abort", 1)),
    _kept_back(2, ("compute", 4), ("write", 3)),
    *[_kept_back(nth, ("commit", 1)) for nth in (2, 2, 4, 4)],  # the last slice, of 2 or of 4
    _kept_back(4, ("abort", 1)),
    Approach((("compute", 1, *TOLD_DECODE),), (("open", 1), ("write", 1), ("compute", 2))),
    Approach((("compute", 2, *TOLD_DECODE),), (("write", 2), ("compute", 3))),
    *[Approach((("flight", 1, *TOLD_PREFILL),), (("abort", 1),))] * 2,
    Approach((("compute", 1, *KILLED),), (("open", 1), ("compute", 2))),
    Approach((("write", 1, "duplicate", 0.5), ("flight", 1, *TOLD_DECODE)), (("flight", 2),)),
    Approach((("write", 1, "duplicate", 0.5), ("flight", 1, *KILLED)), (("flight", 2),)),
    Approach((("flight", 2, *TOLD_DECODE),), (("commit", 1), ("compute", 3), ("flight", 3))),
    *[Approach((("flight", nth, *TOLD_DECODE),), (("commit", 1),)) for nth in (2, 4, 4)],
    *[Approach((("verify", 1, *TOLD_DECODE),), (("verify", 2),))] * 3,  # and quiet soon after
    Approach((("verify", 1, *TOLD_DECODE),), (("answer", 1),)),
    Approach(
        (("verify", 1, *STALLED), ("verify", 1, *TOLD_DECODE)), (("verify", 2), ("answer", 1))
    ),
    *[Approach((("verify", 1, *TOLD_PREFILL),), (("abort", 1),))] * 2,
    *[Approach((("verify", 2, *TOLD_DECODE_LATER),), (("answer", 1),))] * 3,  # a narrow moment
    *[Approach((("verify", 1, *KILLED),), (("verify", 2), ("answer", 1)))] * 2,
    Approach((("flight", 1, *KILLED),), (("compute", 2), ("write", 2), ("abort", 1))),
    *[Approach((("flight", nth, *KILLED),), (("commit", 1),)) for nth in (2, 2, 4, 4)],
    *[Approach((("answer", 1, *KILLED),), (("decode", 1),))] * 2,
    Approach((("answer", 1, *TOLD_DECODE),), (("decode", 1),)),
    Approach((("answer", 1, *DELAYED), ("answer", 1, *TOLD_PREFILL)), (("abort", 1),)),
    Approach((("answer", 1, *DELAYED),), (("abort", 1),)),
    Approach((("open", 1, "corrupt", 0.1),), (("write", 1), ("abort", 1))),
)
"""Ways into states that chance alone finds rarely; those that often miss are there repeatedly."""

EXCUSES = (
    Excuse(
        "the landing has this moment been granted",
        ("grant",),
        ("written", "verifying", "admitted", "finished", "quarantined", "freed", "dead"),
    ),
    Excuse(
        "nobody has opened it yet",
        ("open",),
        ("written", "verifying", "admitted", "finished"),
    ),
    Excuse(
        "the commit leaves after the last slice, and there is one",
        ("compute", "write", "commit"),
        ("verifying", "admitted", "finished"),
    ),
    Excuse(
        "a writer that was refused gets no further than its first write", ("commit",), ("granted",)
    ),
    Excuse("a frame leaves only for a landing that was opened", ("flight",), ("granted",)),
    Excuse(
        "PROMISE: no verdict while a write is under way",
        ("flight",),
        ("verifying", "admitted", "finished"),
    ),
    Excuse("PROMISE: no block is freed while a write is under way", ("flight",), ("freed",)),
    Excuse("a landing that nobody has opened is quiet at once", ("open",), ("quarantined",)),
    Excuse(
        "verifying comes after the writes and before the verdict",
        ("verify",),
        ("granted", "written", "admitted", "finished"),
    ),
    Excuse("an answer follows a verdict", ("answer",), ("granted", "written", "verifying")),
    Excuse(
        "there is nothing to wait for",
        ("quiesce",),
        ("granted", "written", "verifying", "admitted", "finished", "freed", "dead"),
    ),
    Excuse(
        "only what was admitted is decoded",
        ("decode",),
        ("granted", "written", "verifying", "quarantined", "freed"),
    ),
)
"""Why the other combinations cannot occur. Two are promises: hitting them is a failure.

Once a rival was quicker the landing is its, and says nothing of where this handoff is.
"""
