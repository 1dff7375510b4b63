"""The kit's promises of an engine, asked of vLLM beside torch."""

from __future__ import annotations

from pathlib import Path

from backends.testing import conformance, summary

UNPROVEN = {
    "a_seed_gives_its_text_again",
    "presence_penalty_is_honoured",
    "frequency_penalty_is_honoured",
}
"""It says that seeds are the engine's own affair, and declares neither penalty."""


def test_vllm_keeps_what_an_engine_promises(folder: Path) -> None:
    shared = {"model": str(folder), "dtype": "float32", "threads": 1}
    options = {**shared, "context_tokens": 600, "cache_tokens": 4096, "pool_tokens": 2048}
    report = conformance("backends.vllm:VllmBackend", options, reference=("emulation", shared))
    assert report.ok, summary(report)
    assert report.contract == "engine"
    assert {it.promise for it in report.verdicts if it.outcome == "unproven"} == UNPROVEN
