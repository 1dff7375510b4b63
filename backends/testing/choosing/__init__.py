"""Promises about the choice of tokens: each parameter that is declared does what `Sampling` says.

They are the same for both contracts. `asking.py` has what they are made of.
"""

from __future__ import annotations

from backends.testing.choosing.asking import Chooser
from backends.testing.choosing.drawn import (
    min_p_is_honoured,
    temperature_is_honoured,
    top_k_is_honoured,
    top_p_is_honoured,
)
from backends.testing.choosing.told import logprobs_are_honoured, min_tokens_is_honoured
from backends.testing.choosing.weighed import (
    frequency_penalty_is_honoured,
    logit_bias_is_honoured,
    presence_penalty_is_honoured,
    repetition_penalty_is_honoured,
)
from backends.testing.form import Promise

__all__ = ["SAMPLING"]

SAMPLING: tuple[Promise[Chooser], ...] = (
    logprobs_are_honoured,
    logit_bias_is_honoured,
    temperature_is_honoured,
    top_k_is_honoured,
    top_p_is_honoured,
    min_p_is_honoured,
    repetition_penalty_is_honoured,
    presence_penalty_is_honoured,
    frequency_penalty_is_honoured,
    min_tokens_is_honoured,
)
