"""Why a leg has failed, and what may be done about it."""

from __future__ import annotations


class LegFailed(Exception):
    """The leg cannot go on.

    `full`: a worker had no room, and nothing is wrong with it; `draining`: it is about to leave.
    `avoid` are the workers that may have to do with it.
    """

    def __init__(
        self,
        phase: str,
        worker: str,
        cause: str,
        *,
        retry: bool,
        avoid: frozenset[str] = frozenset(),
        full: bool = False,
        draining: bool = False,
    ) -> None:
        super().__init__(f"{phase} on {worker}: {cause}")
        self.phase = phase
        self.worker = worker
        self.cause = cause
        self.retry = retry
        self.avoid = avoid
        self.full = full
        self.draining = draining

    @property
    def counts(self) -> bool:
        """Whether something went wrong that may go wrong again elsewhere."""
        return not (self.full or self.draining)
