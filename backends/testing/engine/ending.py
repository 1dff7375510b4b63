"""Promises about how jobs end: once, and with nothing left."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from backends.testing.desk import GREEDY
from backends.testing.engine.bench import EngineBench
from backends.testing.engine.desk import CANARY, Asked, EngineDesk
from backends.testing.form import require

TURNS = 3

MOST_TURNS = 200
MOST_TOKENS = 8192
"""As large as a prompt is made to fill an engine's memory."""


def _moments(bench: EngineBench) -> Iterator[tuple[str, Callable[[], Asked]]]:
    """Points at which a job is aborted, and how it comes to be there."""
    desk = bench.desk
    prompt = bench.prompts(2)[0]

    def prefix(*, until: str = "") -> Asked:
        asked = desk.prefill(prompt, bench.judged)
        if until == "ready":
            desk.until(asked, lambda it: it.ready or it.outputs, "ready")
        elif until == "prefilled":
            desk.until(asked, lambda it: it.outputs, "prefilled")
        return asked

    def line(*, tokens: int, landed: bool) -> Asked:
        blocks: tuple[int, ...] = ()
        known: list[int] = []
        if landed:
            done = desk.done(desk.prefill(prompt, bench.judged))
            blocks, known = done.blocks, [desk.output(done).sampled[0].token]
        asked = desk.decode(prompt, known, bench.judged, blocks=blocks, tokens=200)
        if tokens:
            desk.until(asked, lambda it: len(it.tokens) >= tokens, f"token {tokens}")
        return asked

    if "prefill" in desk.info.phases:
        yield "a prefix at once", prefix
        yield "a prefix that is exported", lambda: prefix(until="ready")
        yield "a prefix that is done", lambda: prefix(until="prefilled")
    if "decode" in desk.info.phases:
        yield "a sequence in place at once", lambda: line(tokens=0, landed=False)
        yield "a sequence in place", lambda: line(tokens=3, landed=False)
    if {"prefill", "decode"} <= desk.info.phases:
        yield "an import at once", lambda: line(tokens=0, landed=True)
        yield "an imported sequence", lambda: line(tokens=2, landed=True)


def an_aborted_job_ends_once_and_holds_nothing(bench: EngineBench) -> None:
    """Wherever an abort finds a job, `ended` comes once, and its memory is free by then."""
    desk = bench.desk
    held: dict[str, int] = {}

    def look(event: str, job: str) -> None:
        if event == "ended":
            held[job] = desk.backend.pins().get(job, 0)

    for _ in range(TURNS):
        for where, begin in _moments(bench):
            desk.ear.watch = look
            asked = begin()
            desk.abort(asked)
            desk.end(asked)
            require(
                not held[asked.job.name],
                f"pins: {held[asked.job.name]} blocks of {where} when it was told ended; say it "
                "when the memory is free, and count it no more by then",
            )
            desk.clear()
    left = dict(desk.backend.pins())
    require(not left, f"pins: {left} after all jobs have ended")


def an_abort_of_what_is_over_has_no_effect(bench: EngineBench) -> None:
    """An abort that comes late, twice, or for a stranger is heard and forgotten."""
    desk = bench.desk
    for where, begin in _moments(bench):
        asked = begin()
        desk.abort(asked)
        desk.abort(asked)
        desk.end(asked)
        desk.abort(asked)
        desk.abort("nobody")
        desk.quiet()
        _require_silence(desk, asked, where)
        desk.clear()


def nothing_is_said_after_the_end(bench: EngineBench) -> None:
    """After `ended` no event names the job, whether it was aborted or came to its end."""
    desk = bench.desk
    jobs: list[tuple[str, Asked]] = []
    prompt = bench.prompts(1)[0]
    if "prefill" in desk.info.phases:
        jobs.append(("a prefix", desk.done(desk.prefill(prompt, bench.judged))))
    if "decode" in desk.info.phases:
        asked = desk.decode(prompt, (), bench.judged, tokens=3)
        desk.told(asked, 3)
        jobs.append(("a sequence", asked))
    for where, begin in _moments(bench):
        asked = begin()
        desk.abort(asked)
        desk.end(asked)
        jobs.append((where, asked))
    desk.quiet()
    for where, asked in jobs:
        _require_silence(desk, asked, where)


def _require_silence(desk: EngineDesk, asked: Asked, where: str) -> None:
    late = asked.story.late
    require(not late, f"{', '.join(late)} of {where} after it was told ended; say that last, once")
    require(not desk.ear.strange, f"{', '.join(desk.ear.strange[:3])}: nobody gave such a job")


def memory_comes_back(bench: EngineBench) -> None:
    """Jobs that come and go, twice as many as fit at once, leave room for the largest one."""
    desk = bench.desk
    capacity = desk.info.engine_blocks
    prompt = bench.prompts(2)[0]
    turns = min(2 + 2 * capacity // desk.layout.blocks_for(len(prompt)), MOST_TURNS)
    for turn in range(turns):
        if "decode" in desk.info.phases:
            asked = desk.decode(prompt, (), GREEDY, tokens=50)
            if turn % 2:
                desk.until(asked, lambda it: it.tokens, "the first token")
        else:
            asked = desk.prefill(prompt, GREEDY, export=False)
        desk.abort(asked)
        desk.end(asked)
        require(
            not asked.story.errors,
            f"{asked.story.name} failed, and had all memory: {asked.story.errors[:1]}; "
            "an abort gives all of a job's memory back",
        )
        desk.clear()
    _require_room_for_the_largest(bench)


def _require_room_for_the_largest(bench: EngineBench) -> None:
    desk = bench.desk
    size, limit = desk.layout.block_tokens, desk.info.context_tokens
    length = max(1, min(limit, desk.info.engine_blocks * size, MOST_TOKENS) - 3)
    prompt = [at % desk.info.vocabulary for at in range(length)]
    if "decode" in desk.info.phases:
        desk.told(desk.decode(prompt, (), bench.judged, tokens=2), 2)
    else:
        desk.done(desk.prefill(prompt, bench.judged, export=False))


def it_can_be_closed_with_jobs_open(bench: EngineBench) -> None:
    """`close` returns while jobs are under way; the arena is left alone, and another is made."""
    desk = bench.desk
    prompt = bench.prompts(1)[0]
    for _ in range(3):
        if "prefill" in desk.info.phases:
            desk.prefill(prompt, bench.judged)
        if "decode" in desk.info.phases:
            desk.decode(prompt, (), bench.judged, tokens=200)
    bench.stop()
    desk.fill()
    desk.quiet()
    touched = any(bool((array != CANARY).any()) for array in desk.arena())
    require(not touched, "close: the arena was written to after it had returned")
    _require_room_for_the_largest(bench)
