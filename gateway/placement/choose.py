"""Choose the workers for a prefix: filter, score, pick, and say why.

Pure functions over a snapshot: no I/O and no clock, so that a simulation runs the same code.
"""

from __future__ import annotations

from gateway.placement.views import Placement, Snapshot, Unplaceable, Wish, WorkerView


def place(snapshot: Snapshot, wish: Wish) -> Placement | Unplaceable:
    """The least loaded pair, or worker that does both; a pair where they are equal."""
    refusals = {worker.id: _refusal(worker, wish) for worker in snapshot.workers}
    able = {worker.id: worker for worker in snapshot.workers if refusals[worker.id] is None}
    options = [*_pairs(snapshot, able, wish), *_alone(able, wish)]
    if options:
        return min(options, key=lambda option: option[0])[1]
    faults = {i: refusal for i, refusal in refusals.items() if refusal and refusal.field}
    willing = {
        worker.id: worker for worker in snapshot.workers if worker.id in able or worker.id in faults
    }
    if _pairs(snapshot, willing, wish) or _alone(willing, wish):
        return next(iter(faults.values()))  # all would do, were the request another one
    told = [refusal for refusal in refusals.values() if refusal is not None]
    if told and len(told) == len(snapshot.workers):
        return told[0]
    return Unplaceable(_missing(snapshot))


Option = tuple[tuple[int, int, int, float, str], Placement]
PAIR, ALONE = 0, 1


def _pairs(snapshot: Snapshot, able: dict[str, WorkerView], wish: Wish) -> list[Option]:
    found: list[Option] = []
    for prefill_id, decode_id in sorted(snapshot.pairs) if wish.decodes else ():
        prefill, decode = able.get(prefill_id), able.get(decode_id)
        if prefill is None or decode is None:
            continue
        avoided = (prefill_id in wish.avoid) + (decode_id in wish.avoid)
        fill = 1 - decode.free_blocks / decode.info.pool_blocks
        score = (avoided, prefill.queued_tokens, PAIR, fill, f"{prefill_id} {decode_id}")
        reason = f"{prefill.queued_tokens} tokens wait there, decode pool {fill:.0%} full"
        found.append((score, Placement(prefill_id, decode_id, reason)))
    return found


def _alone(able: dict[str, WorkerView], wish: Wish) -> list[Option]:
    found: list[Option] = []
    for worker in able.values():
        if worker.role == "decode" or (wish.decodes and worker.role != "both"):
            continue
        fill = 1 - worker.free_blocks / worker.info.pool_blocks
        score = (int(worker.id in wish.avoid), worker.queued_tokens, ALONE, fill, worker.id)
        reason = "nothing to hand over" if not wish.decodes else "prefills and decodes in place"
        found.append((score, Placement(worker.id, None, reason)))
    return found


def _refusal(worker: WorkerView, wish: Wish) -> Unplaceable | None:
    info = worker.info
    if worker.draining:
        return Unplaceable(f"{worker.id} is draining")
    for name in info.unsupported(wish.sampling):
        return Unplaceable(f"{name} is not supported by {worker.id}", field=name)
    if wish.tokens >= info.context_tokens:
        return Unplaceable(
            f"{wish.tokens} tokens exceed the context of {info.context_tokens}", field="messages"
        )
    if info.layout.blocks_for(wish.tokens) + wish.sequences > info.pool_blocks:
        return Unplaceable(f"{wish.tokens} tokens exceed the pool of {worker.id}", field="messages")
    return None


def _missing(snapshot: Snapshot) -> str:
    roles = {worker.role for worker in snapshot.workers}
    for role in ("prefill", "decode"):
        if role not in roles and "both" not in roles:
            return f"no {role} worker is connected"
    return "no prefill worker has met a decode worker yet"
