"""Which workers a prefix goes to: pure functions over a snapshot of the fleet, and the reason.

Nothing here does I/O or has a clock, so that a simulation runs the same code. `views.py` has the
nouns, `choose.py` the choice.
"""

from gateway.placement.choose import place
from gateway.placement.views import Placement, Snapshot, Unplaceable, Wish, WorkerView

__all__ = ["Placement", "Snapshot", "Unplaceable", "Wish", "WorkerView", "place"]
