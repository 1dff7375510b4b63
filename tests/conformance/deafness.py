"""Of which parameters a plug-in may take no notice, and which promise that breaks."""

from __future__ import annotations

from typing import Any

DEAF: dict[str, dict[str, Any]] = {
    "temperature_is_honoured": {"temperature": 0.0},
    "top_k_is_honoured": {"top_k": 0},
    "top_p_is_honoured": {"top_p": 1.0},
    "min_p_is_honoured": {"min_p": 0.0},
    "repetition_penalty_is_honoured": {"repetition_penalty": 1.0},
    "presence_penalty_is_honoured": {"presence_penalty": 0.0},
    "frequency_penalty_is_honoured": {"frequency_penalty": 0.0},
    "logit_bias_is_honoured": {"logit_bias": {}},
    "logprobs_are_honoured": {"logprobs": 2},
    "min_tokens_is_honoured": {"min_tokens": 0},
}
