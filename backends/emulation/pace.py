"""Make steps last as long as they would elsewhere, layer by layer."""

from __future__ import annotations

import time

HIDDEN_GAP_SECONDS = 0.010
"""What the host may do between two steps without their ticks moving."""

TOLERANCE = 0.05
"""How much longer than it should a step may take before it counts as late."""


class Pace:
    """Keeps the time of one step after another.

    Steps that follow each other closely tick at absolute times: what the host does between them
    costs nothing.
    """

    def __init__(self) -> None:
        self._starts = self._due = 0.0
        self.steps = self.late = 0

    def begin(self, seconds: float) -> None:
        """A step begins that is to last so long."""
        now = time.monotonic()
        close = now - self._due < min(seconds / 2, HIDDEN_GAP_SECONDS)
        self._starts = self._due if close else now
        self._due = self._starts + seconds
        self.steps += 1

    def reach(self, part: float) -> None:
        """Return when this part of the step, up to 1, would be done."""
        left = self._starts + (self._due - self._starts) * part - time.monotonic()
        if left > 0:
            time.sleep(left)

    def end(self) -> bool:
        """Return when the step would be over; False: it took clearly longer by itself."""
        allowed = (self._due - self._starts) * TOLERANCE
        in_time = time.monotonic() <= self._due + allowed
        self.late += not in_time
        self.reach(1.0)
        return in_time
