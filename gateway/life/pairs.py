"""Which prefill workers have met which decode workers, and how that went."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import structlog

from backends.protocol import Meet, Met
from gateway.life.worker import Worker

log = structlog.get_logger()

Identity = tuple[str, int]


class Pairs:
    """Has every prefill worker meet every decode worker of `workers`, which the fleet keeps."""

    def __init__(self, workers: Mapping[str, Worker], changed: Callable[[], None]) -> None:
        self._workers = workers
        self._changed = changed
        self._met: dict[tuple[Identity, Identity], Met] = {}

    @property
    def met(self) -> tuple[tuple[str, str, Met], ...]:
        """Pairs of connected workers that have met, and how that went."""
        alive = {worker.identity for worker in self._workers.values()}
        return tuple(
            (prefill[0], decode[0], met)
            for (prefill, decode), met in self._met.items()
            if prefill in alive and decode in alive
        )

    @property
    def able(self) -> frozenset[tuple[str, str]]:
        """Pairs that can hand over."""
        return frozenset(
            (prefill, decode)
            for prefill, decode, met in self.met
            if not met.refusal and prefill not in self._workers[decode].shunned
        )

    def transport(self, prefill: Worker, decode: Worker) -> str:
        """What this pair agreed on; empty when it has not, or lost it again."""
        met = self._met.get((prefill.identity, decode.identity))
        return met.transport if met is not None else ""

    def introduce(self) -> None:
        """Have every prefill worker meet every decode worker that it has not met."""
        for prefill in self._workers.values():
            for decode in self._workers.values():
                if self._should_meet(prefill, decode):
                    prefill.send(
                        Meet(
                            worker=decode.id,
                            incarnation=decode.welcome.incarnation,
                            layout=decode.welcome.info.layout,
                            endpoints=decode.welcome.endpoints,
                            shards=decode.welcome.info.shards,
                            exact=decode.welcome.info.continuation == "exact",
                        )
                    )

    def _should_meet(self, prefill: Worker, decode: Worker) -> bool:
        if prefill is decode or prefill.welcome.role == "decode":
            return False
        if decode.welcome.role == "prefill":
            return False
        met = self._met.get((prefill.identity, decode.identity))
        return met is None or bool(met.refusal)

    def heard(self, prefill: Worker, met: Met) -> None:
        """How a meeting went, or that the two have lost each other."""
        decode = self._workers.get(met.worker)
        if decode is None:
            return
        pair = (prefill.identity, decode.identity)
        before = self._met.get(pair)
        if before != met:
            log.info(
                "pair.met",
                prefill=prefill.id,
                decode=decode.id,
                transport=met.transport,
                plan=met.plan,
                reason=met.reason,
                refusal=met.refusal,
            )
        self._met[pair] = met
        if met.refusal and before is not None and not before.refusal:
            self.introduce()  # they have lost each other
        self._changed()

    def forget(self, worker: Worker) -> None:
        """This start of this worker is gone."""
        self._met = {pair: met for pair, met in self._met.items() if worker.identity not in pair}
