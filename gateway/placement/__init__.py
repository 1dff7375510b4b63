"""Which workers a prefix goes to: pure functions over a snapshot of the fleet, and the reason.

Nothing here does I/O or has a clock, so that a simulation runs the same code. `views.py` has the
nouns, `choose.py` the choice, `forecast.py` what it chooses by, `estimates.py` where those numbers
come from, `books.py` what has been placed already.
"""

from gateway.placement.books import Booking, Books
from gateway.placement.choose import least_seconds, place
from gateway.placement.views import Placement, Snapshot, Unplaceable, Wish, WorkerView

__all__ = [
    "Booking",
    "Books",
    "Placement",
    "Snapshot",
    "Unplaceable",
    "Wish",
    "WorkerView",
    "least_seconds",
    "place",
]
