"""What became of recent requests: where they were when, and why they were placed as they were.

Kept in this gateway's memory, for `GET /admin/requests/{id}`; a request is forgotten when it has
ended and enough others have ended after it. No prompt and no token is kept.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from typing import Any

import msgspec

from gateway.life.job import Job, Timeline
from gateway.life.states import State
from gateway.placement import Placement

RECENT = 512
MOST_EVENTS = 64
MOST_PLACEMENTS = 8


class Record:
    """One request's. Times are seconds since it arrived."""

    def __init__(self, job: Job, timeline: Timeline) -> None:
        self._job = _About(
            job.id, job.model, job.tenant, len(job.prompt), job.n, job.max_tokens, job.priority
        )
        self._timeline = timeline
        self._created = time.time()
        self._began = _now()
        self._states: list[tuple[float, State]] = []
        self._placements: list[tuple[float, Placement]] = []
        self._failures: list[tuple[float, str]] = []
        self._dropped = 0

    def became(self, state: State) -> None:
        """It, or a part of it that goes alone, is in another state."""
        self._keep(self._states, state, MOST_EVENTS)

    def placed(self, placement: Placement) -> None:
        """Workers were chosen."""
        self._keep(self._placements, placement, MOST_PLACEMENTS)

    @property
    def reason(self) -> str:
        """Why it is where it was placed last."""
        return self._placements[-1][1].reason.summary if self._placements else ""

    def failed(self, cause: str) -> None:
        """Something went wrong; it may have gone on elsewhere."""
        self._keep(self._failures, cause, MOST_EVENTS)

    def _keep(self, where: list[tuple[float, Any]], what: Any, most: int) -> None:
        if len(where) >= most:
            del where[most // 2]  # the first and the last tell most
            self._dropped += 1
        where.append((_now() - self._began, what))

    def shown(self) -> dict[str, Any]:
        """As JSON may hold it."""
        timeline = msgspec.structs.asdict(self._timeline)
        return {
            **msgspec.structs.asdict(self._job),
            "created": self._created,
            "state": self._states[-1][1] if self._states else None,
            "states": [{"at": round(at, 6), "state": state} for at, state in self._states],
            "placements": [
                {"at": round(at, 6), **msgspec.to_builtins(it)} for at, it in self._placements
            ],
            "failures": [{"at": round(at, 6), "cause": cause} for at, cause in self._failures],
            "timeline": {name: it for name, it in timeline.items() if it is not None},
            "events_dropped": self._dropped,
        }


class _About(msgspec.Struct, frozen=True):
    id: str
    model: str
    tenant: str
    prompt_tokens: int
    n: int
    max_tokens: int
    priority: int


class History:
    """Records by the id of their request."""

    def __init__(self, recent: int = RECENT) -> None:
        self._recent = recent
        self._under_way: dict[str, Record] = {}
        self._ended: OrderedDict[str, Record] = OrderedDict()

    def begin(self, job: Job, record: Record) -> None:
        """Keep the record of a request under way."""
        self._under_way[job.id] = record

    def end(self, job: Job) -> None:
        """Keep it a little longer."""
        record = self._under_way.pop(job.id, None)
        if record is not None:
            self._ended[job.id] = record
            self._ended.move_to_end(job.id)
        while len(self._ended) > self._recent:
            self._ended.popitem(last=False)

    def find(self, request_id: str) -> dict[str, Any] | None:
        """What is known of a request of this gateway, by its id or that of its answer."""
        name = request_id.removeprefix("chatcmpl-").removeprefix("cmpl-")
        record = self._under_way.get(name) or self._ended.get(name)
        return record.shown() if record is not None else None


def _now() -> float:
    return asyncio.get_running_loop().time()
