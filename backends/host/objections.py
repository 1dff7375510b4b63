"""Why a request can never run on this worker, before anything is taken for it."""

from __future__ import annotations

from itertools import chain

from backends.api import BackendInfo
from backends.protocol import RequestSpec, Role


def objection(
    spec: RequestSpec, info: BackendInfo, role: Role, *, prefill: bool, decode: bool
) -> str:
    """One reason in words; empty when there is none. `prefill`, `decode`: what it would do here."""
    lengths = {len(one.generated) for one in spec.sequences}
    prefix = len(spec.prompt) + max(0, max(lengths) - 1)
    if role == "prefill" and decode:
        return "this worker does not decode"
    if not spec.prompt:
        return "prompt: must have at least one token"
    if prefix >= info.context_tokens:
        return f"prompt: {prefix} tokens exceed the context of {info.context_tokens}"
    if len(lengths) > 1 or (len(spec.sequences) > 1 and max(lengths) > 1):
        return "sequences: unlike ones cannot share a prefix"
    if len({one.index for one in spec.sequences}) < len(spec.sequences):
        return "sequences: two have the same index"
    sequences = len(spec.sequences) if decode else 0
    if not info.fits(prefix, sequences):
        blocks = info.layout.blocks_for(prefix) + sequences
        return f"prompt: {blocks} blocks wanted, the pool has {info.most_blocks}"
    known = chain(spec.prompt, *(one.generated for one in spec.sequences))
    if not all(0 <= token < info.vocabulary for token in known):
        return f"prompt: token ids must lie in 0..{info.vocabulary - 1}"
    if prefill and spec.prompt_logprobs is not None and not info.prompt_logprobs:
        return "prompt_logprobs: not supported by this worker's backend"
    wrong = info.unsupported(spec.sampling)
    if wrong:
        return f"{wrong[0]}: not supported by this worker's backend"
    return ""
