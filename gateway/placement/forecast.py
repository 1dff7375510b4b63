"""Predict what a prefix will get on a worker or a pair: what is booked, and what things cost."""

from __future__ import annotations

from gateway.placement.views import Forecast, LinkView, Wish, WorkerView

_UNKNOWN = LinkView()


def matched(worker: WorkerView, wish: Wish) -> int:
    """How many tokens of the prefix, from the first on, have their KV there already.

    Never all: the last position must be computed, as the next token is sampled from it.
    """
    if not worker.kept:
        return 0
    layout = worker.info.layout
    blocks = 0
    for mark in wish.marks.get(layout.fingerprint, ()):
        if mark not in worker.kept:
            break
        blocks += 1
    return max(0, min(blocks * layout.block_tokens, wish.tokens - 1))


def together(
    prefill: WorkerView, decode: WorkerView, link: LinkView | None, wish: Wish
) -> Forecast:
    """Prefill on one worker, decode on another."""
    link = link or _UNKNOWN
    cached = matched(prefill, wish)
    beside = _beside(prefill, wish.tokens - cached)
    prefilling = prefill.prefill.seconds(wish.tokens, cached) + beside
    first = prefill.queued_seconds + prefilling
    layout = decode.info.layout
    moved = (wish.tokens - matched(decode, wish)) * layout.block_bytes // layout.block_tokens
    return Forecast(
        first_token=first,
        wait=prefill.queued_seconds,
        beside=beside,
        handoff=max(0.0, link.queued_seconds - first) + link.cost.seconds(moved),
        gap=_gap(decode, wish),
        delay=_delay(prefill, prefilling),
        cached=cached,
        moved=moved,
    )


def alone(worker: WorkerView, wish: Wish) -> Forecast:
    """Prefill, and decode where more than the first token is wanted, on one worker."""
    cached = matched(worker, wish)
    beside = _beside(worker, wish.tokens - cached)
    prefilling = worker.prefill.seconds(wish.tokens, cached) + beside
    return Forecast(
        first_token=worker.queued_seconds + prefilling,
        wait=worker.queued_seconds,
        beside=beside,
        handoff=0.0,
        gap=_gap(worker, wish) if wish.decodes else 0.0,
        delay=_delay(worker, prefilling),
        cached=cached,
    )


def widest_gap(worker: WorkerView, wish: Wish, *, prefills: bool) -> float:
    """The longest gap that sequences decoded there will see, those that are there included.

    With `prefills` a chunk of this prefix shares steps with them; what is queued there does so
    anyway.
    """
    queued = worker.queued_tokens if worker.role == "both" else 0
    chunk = min(worker.step_tokens, queued + (wish.tokens if prefills else 0))
    return _gap(worker, wish) + (worker.prefill.seconds(chunk) if chunk else 0.0)


def _beside(worker: WorkerView, tokens: int) -> float:
    """Each chunk also computes a row of every sequence that is decoded there."""
    if not worker.running or worker.role != "both":
        return 0.0
    steps = -(-tokens // worker.step_tokens)
    return steps * worker.step.seconds(worker.running, worker.context)


def _gap(worker: WorkerView, wish: Wish) -> float:
    """Between two tokens of a sequence, once this prefix is decoded there too."""
    sequences, context = worker.running, worker.context
    if wish.decodes:
        sequences += wish.sequences
        context += wish.sequences * wish.tokens
    # those beyond the largest batch take turns with the others
    turns = max(1.0, sequences / worker.info.max_batch)
    return turns * worker.step.seconds(round(sequences / turns), round(context / turns))


def _delay(worker: WorkerView, prefilling: float) -> float:
    return worker.running * prefilling if worker.role == "both" else 0.0
