"""Choose the workers for a prefix: filter, score, pick, and say why.

Pure functions over a snapshot: no I/O and no clock, so that a simulation runs the same code.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import nsmallest
from math import inf

from gateway.placement.forecast import alone, together, widest_gap
from gateway.placement.views import (
    Candidate,
    Forecast,
    Placement,
    Reason,
    Snapshot,
    Unplaceable,
    Wish,
    WorkerView,
)

SHOWN = 8
"""How many candidates, and how many of those left out, a reason lists."""

MARGIN = 0.9
"""The part of a limit that is aimed at: what is held just at it misses it half of the time."""

Option = tuple[WorkerView, WorkerView | None]
Score = tuple[int, int, float, int, str, str]
Scored = tuple[Score, Candidate]


def place(snapshot: Snapshot, wish: Wish) -> Placement | Unplaceable:
    """The workers that will be done soonest, counting what others lose by it.

    Options that are predicted to keep the wish's limits go before those that are not, and workers
    to avoid come last. Where nothing has room, or the first token would be late everywhere,
    that is the answer; an idle worker is never called late, as its measurements are the way back
    from a wrong prediction.
    """
    refusals = {worker.id: _refusal(worker, wish) for worker in snapshot.workers}
    able = {worker.id: worker for worker in snapshot.workers if refusals[worker.id] is None}
    options = list(_options(snapshot, able, wish))
    if not options:
        return _nobody(snapshot, able, refusals, wish)
    roomy = [option for option in options if not _full(option, wish)]
    if not roomy:
        return Unplaceable(
            "no worker has room now", kind="full", left_out=_left_out(snapshot, refusals)
        )
    scored = [_score(snapshot, option, wish) for option in roomy]
    best = nsmallest(SHOWN, scored, key=lambda one: one[0])
    chosen = best[0][1]
    if _hopeless(roomy, scored, wish):
        soonest = min(one.forecast.first_token for _, one in scored)
        left = wish.first_token_seconds
        return Unplaceable(
            f"its first token would take {soonest:.2f} s and is due in {left:.2f} s",
            kind="late",
            left_out=_left_out(snapshot, refusals),
        )
    full = [(_named(option), "no room now") for option in options if _full(option, wish)]
    summary = _summary(chosen, len(scored))
    reason = Reason(
        summary, tuple(one for _, one in best), (*_left_out(snapshot, refusals), *full)[:SHOWN]
    )
    return Placement(chosen.prefill, chosen.decode, chosen.forecast, reason)


def least_seconds(snapshot: Snapshot, wish: Wish) -> float:
    """The least time that its first token needs, were every worker idle; 0 when not known."""
    able = {one.id: one for one in snapshot.workers if _refusal(one, wish) is None}
    least = inf
    for prefill, _ in _options(snapshot, able, wish):
        if not prefill.prefill.known:
            return 0.0
        least = min(least, prefill.prefill.seconds(wish.tokens))
    return 0.0 if least == inf else least


# ---- filter


def _options(snapshot: Snapshot, able: dict[str, WorkerView], wish: Wish) -> Iterator[Option]:
    for prefill_id, decode_id in snapshot.pairs if wish.decodes else ():
        prefill, decode = able.get(prefill_id), able.get(decode_id)
        if prefill is not None and decode is not None:
            yield prefill, decode
    for worker in able.values():
        if worker.role == "both" or (worker.role == "prefill" and not wish.decodes):
            yield worker, None


def _refusal(worker: WorkerView, wish: Wish) -> Unplaceable | None:
    """Why this worker can do it never, or not before it is another one."""
    info = worker.info
    if worker.draining:
        return Unplaceable(f"{worker.id} is draining")
    if worker.left_alone:
        return Unplaceable(f"{worker.id} is left alone: {worker.left_alone}")
    for name in info.unsupported(wish.sampling):
        return Unplaceable(f"{name} is not supported by {worker.id}", field=name)
    if wish.prompt_logprobs and worker.role != "decode" and not info.prompt_logprobs:
        return Unplaceable(f"log probabilities of the prompt: {worker.id} has none", field="echo")
    if wish.tokens >= info.context_tokens:
        return Unplaceable(
            f"{wish.tokens} tokens exceed the context of {info.context_tokens}", field="messages"
        )
    if not info.fits(wish.tokens, wish.sequences):
        return Unplaceable(f"{wish.tokens} tokens exceed the pool of {worker.id}", field="messages")
    return None


def _full(option: Option, wish: Wish) -> bool:
    """Whether what is booked leaves no room; nothing booked is as much room as there ever is."""
    prefill, decode = option
    holder = decode or prefill
    if not wish.decodes or not holder.running:
        return False
    wanted = holder.info.layout.blocks_for(wish.tokens) + wish.sequences
    if holder.free_blocks < wanted:
        return True
    gap = widest_gap(holder, wish, prefills=decode is None)
    return holder.step.known and gap > MARGIN * wish.gap_seconds


def _nobody(
    snapshot: Snapshot,
    able: dict[str, WorkerView],
    refusals: dict[str, Unplaceable | None],
    wish: Wish,
) -> Unplaceable:
    """Why there is no option at all."""
    faults = {i: refusal for i, refusal in refusals.items() if refusal and refusal.field}
    willing = {
        worker.id: worker for worker in snapshot.workers if worker.id in able or worker.id in faults
    }
    if any(_options(snapshot, willing, wish)):
        return next(iter(faults.values()))  # all would do, were the request another one
    told = [refusal for refusal in refusals.values() if refusal is not None]
    if told and len(told) == len(snapshot.workers):
        return told[0]
    missing = _missing(snapshot, able)
    return Unplaceable(
        f"{missing}; {told[0].reason}" if told else missing, left_out=_left_out(snapshot, refusals)
    )


def _missing(snapshot: Snapshot, able: dict[str, WorkerView]) -> str:
    roles = {worker.role for worker in able.values()}
    for role in ("prefill", "decode"):
        if role not in roles and "both" not in roles:
            return f"no {role} worker is connected"
    for (prefill, decode), why in snapshot.left_alone.items():
        return f"{prefill} -> {decode} is left alone: {why}"
    return "no prefill worker has met a decode worker yet"


# ---- score


def _score(snapshot: Snapshot, option: Option, wish: Wish) -> Scored:
    prefill, decode = option
    if decode is None:
        forecast = alone(prefill, wish)
    else:
        link = snapshot.links.get((prefill.id, decode.id))
        forecast = together(prefill, decode, link, wish)
    short = _short(option, forecast, wish)
    decode_id = decode.id if decode is not None else None
    avoided = sum(worker.id in wish.avoid for worker in option if worker is not None)
    score = (
        avoided,
        int(bool(short)),
        forecast.cost(wish.expected),
        int(decode is None),
        prefill.id,
        decode_id or "",
    )
    return score, Candidate(prefill.id, decode_id, forecast, short)


def _short(option: Option, forecast: Forecast, wish: Wish) -> str:
    prefill, decode = option
    if forecast.first_token > MARGIN * wish.first_token_seconds:
        return "first token"
    if not wish.decodes:
        return ""
    gap = widest_gap(decode or prefill, wish, prefills=decode is None)
    return "gap" if gap > MARGIN * wish.gap_seconds else ""


def _hopeless(options: list[Option], scored: list[Scored], wish: Wish) -> bool:
    """Whether its first token would be late everywhere, and none of the workers is idle."""
    return wish.first_token_seconds <= 0 or all(
        one.short == "first token" and not _idle(option)
        for option, (_, one) in zip(options, scored, strict=True)
    )


def _idle(option: Option) -> bool:
    return not any(worker.queued_tokens or worker.running for worker in option if worker)


# ---- the reason


def _named(option: Option) -> str:
    prefill, decode = option
    return prefill.id if decode is None else f"{prefill.id} -> {decode.id}"


def _left_out(
    snapshot: Snapshot, refusals: dict[str, Unplaceable | None]
) -> tuple[tuple[str, str], ...]:
    workers = [(i, it.reason) for i, it in refusals.items() if it is not None]
    pairs = [(f"{p} -> {d}", f"left alone: {why}") for (p, d), why in snapshot.left_alone.items()]
    return (*workers, *pairs)[:SHOWN]


def _summary(chosen: Candidate, count: int) -> str:
    it = chosen.forecast
    where = f"{chosen.prefill} alone" if chosen.decode is None else "the pair"
    return (
        f"{where} is done soonest of {count}: first token in {it.first_token * 1e3:.0f} ms "
        f"({it.wait * 1e3:.0f} waiting), handoff {it.handoff * 1e3:.0f} ms, "
        f"gaps of {it.gap * 1e3:.1f} ms, others lose {it.delay * 1e3:.0f} ms"
        + (f"; misses the limit on the {chosen.short}" if chosen.short else "")
    )
