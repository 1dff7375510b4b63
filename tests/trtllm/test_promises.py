"""On the stand-in, every promise of the contract is kept that a prefill engine can keep.

What KV means is not among them: the stand-in's is a formula, which no reference engine continues.
Nor is the choice of tokens, as it has no logits: its tokens are a formula too.
"""

from pathlib import Path

import pytest

from backends.testing import conformance, summary
from tests.trtllm.handing import SYNTHETIC
from tests.trtllm.play import standin, write_model

FORMULAS = {
    "the_reference_continues_what_it_exports",
    "temperature_is_honoured",
    "min_tokens_is_honoured",
}


@pytest.mark.parametrize("cancel", ["hook", "recycle"])
def test_no_promise_is_broken(tmp_path: Path, cancel: str) -> None:
    options = {
        "model": str(write_model(tmp_path / "model")),
        "block_tokens": 16,
        "pool_tokens": 4096,
        "context_tokens": 1024,
        "chunk_tokens": 64,
        "kv_cache": {"max_tokens": 4096},
        **SYNTHETIC,
    }
    with standin("1.3", cancel=cancel):
        report = conformance("backends.tensorrt_llm.engine:TensorRTLLM", options)
    broken = {it.promise for it in report.verdicts if it.outcome == "broken"}
    assert broken <= FORMULAS, summary(report)
    assert sum(it.outcome == "kept" for it in report.verdicts) >= 13, summary(report)
