"""Workers and wishes to place, with what things cost stated."""

from typing import Any

from backends.api import BackendInfo, KVLayout
from backends.protocol import Role, Sampling
from gateway.placement import Snapshot, Wish, WorkerView
from gateway.placement.costs import LinkCost, PrefillCost, StepCost
from gateway.placement.views import LinkView

PREFILL = PrefillCost(base=0.01, linear=1e-4, square=0.0, known=True)
STEP = StepCost(base=0.02, row=1e-3, context=0.0, known=True)
LINK = LinkCost(base=0.005, byte=0.0, known=True)


def info(**changes: Any) -> BackendInfo:
    layout = KVLayout(
        model="m",
        weights="w",
        layers=2,
        kv_heads=2,
        head_dim=16,
        dtype="float16",
        block_tokens=changes.pop("block_tokens", 16),
        rope="half",
    )
    stated: dict[str, Any] = {
        "layout": layout,
        "pool_blocks": 4096,
        "vocabulary": 100,
        "context_tokens": 32768,
        "end_tokens": (),
        "rng": "positional",
        "continuation": "exact",
        "sampling": frozenset(Sampling.__struct_fields__),
    }
    return BackendInfo(**{**stated, **changes})


def worker(name: str, role: Role, **known: Any) -> WorkerView:
    of_backend = known.pop("backend", {})
    stated: dict[str, Any] = {
        "queued_tokens": 0,
        "running": 0,
        "free_blocks": 4096,
        "prefill": PREFILL,
        "step": STEP,
    }
    return WorkerView(id=name, role=role, info=info(**of_backend), **{**stated, **known})


def snapshot(
    *workers: WorkerView, links: dict[tuple[str, str], LinkView] | None = None
) -> Snapshot:
    """All pairs have met."""
    pairs = frozenset(
        (prefill.id, decode.id)
        for prefill in workers
        for decode in workers
        if prefill is not decode and prefill.role != "decode" and decode.role != "prefill"
    )
    return Snapshot(workers, pairs, links or {pair: LinkView(cost=LINK) for pair in pairs})


def wish(tokens: int = 1000, **more: Any) -> Wish:
    stated: dict[str, Any] = {"sequences": 1, "sampling": Sampling(), "expected": 100}
    return Wish(tokens=tokens, **{**stated, **more})
