"""Promises about what an engine says of itself, and how it takes what it is given."""

from __future__ import annotations

from backends.api import Sampling
from backends.testing.engine.bench import EngineBench
from backends.testing.form import Unproven, require

PROMPT_SECONDS = 0.05
"""A gateway must not wait longer for anything, so nothing may stand in the event loop's way."""


def its_statements_make_sense(bench: EngineBench) -> None:
    """`info` holds no contradiction, the arena takes the longest prefix, and nothing is held."""
    desk = bench.desk
    info, layout = desk.info, desk.layout
    fields = set(Sampling.__struct_fields__)
    require(info.kind == "engine", f'info.kind is {info.kind!r}; that of an engine is "engine"')
    require(info.phases, "info.phases is empty; name what it can do: prefill, decode or both")
    require(
        info.engine_blocks >= layout.blocks_for(2),
        f"info.engine_blocks is {info.engine_blocks}; it is the capacity of the engine's memory",
    )
    require(
        info.pool_blocks >= layout.blocks_for(info.context_tokens),
        f"info.pool_blocks is {info.pool_blocks}, which are fewer than a prefix of "
        f"{info.context_tokens} tokens takes: have a larger arena, or state a shorter context",
    )
    require(
        info.sampling <= fields,
        f"info.sampling: {sorted(info.sampling - fields)} are no fields of Sampling; "
        f"those are {', '.join(sorted(fields))}",
    )
    strange = [token for token in info.end_tokens if not 0 <= token < info.vocabulary]
    require(not strange, f"info.end_tokens: {strange} are not ids of a vocabulary")
    held = dict(desk.backend.pins())
    require(not held, f"pins: {held} before any job was given")


def calls_return_at_once(bench: EngineBench) -> None:
    """`prefill`, `decode`, `abort` and `pins` do not wait for the engine."""
    desk = bench.desk
    prompts = bench.prompts()
    for prompt in prompts:
        jobs = []
        if "prefill" in desk.info.phases:
            jobs.append(desk.prefill(prompt))
        if "decode" in desk.info.phases:
            jobs.append(desk.decode(prompt, tokens=8))
        for job in jobs:
            desk.abort(job)
        desk.pins()
        for job in jobs:
            desk.end(job)
    for name in ("prefill", "decode", "abort", "pins"):
        took = desk.calls.get(name)
        if took:
            require(
                min(took) <= PROMPT_SECONDS,
                f"{name} took {min(took):.2f} s at least; it is called on the host's event loop, "
                "where all requests wait for it: put the job into a queue and return",
            )
    if not desk.calls:
        raise Unproven("nothing could be asked of it")
