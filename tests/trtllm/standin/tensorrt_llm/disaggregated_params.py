import enum
from dataclasses import dataclass, field, make_dataclass

from tensorrt_llm.standin.flavour import LACKING, since


class DisaggScheduleStyle(enum.IntEnum):
    CONTEXT_FIRST = 0
    GENERATION_FIRST = 1


@dataclass(slots=True, kw_only=True)
class _Common:
    request_type: str | None = None
    first_gen_tokens: list[int] | None = None
    ctx_request_id: int | None = None
    opaque_state: bytes | None = None
    draft_tokens: list[int] | None = None
    multimodal_embedding_handles: list | None = None
    multimodal_hashes: list | None = None

    def __post_init__(self):
        if self.request_type is None:
            return
        self.request_type = self.request_type.lower()
        if self.request_type not in ("context_only", "generation_only", "context_and_generation"):
            raise ValueError(f"Unknown request type: {self.request_type}")


_LATER = {
    "1.2": ["disagg_request_id"],
    "1.3": [
        *("first_gen_log_probs", "first_gen_logits", "ctx_dp_rank", "ctx_info_endpoint"),
        *("schedule_style", "mrope_position_ids_handle", "mrope_position_deltas_handle"),
    ],
    "main": ["multimodal_item_runs"],
}

DisaggregatedParams = make_dataclass(
    "DisaggregatedParams",
    [
        (name, object, field(default=None))
        for flavour, names in _LATER.items()
        if since(flavour)
        for name in names
        if name not in LACKING
    ],
    bases=(_Common,),
    namespace={"__module__": __name__},
    kw_only=True,
    slots=True,
)
