"""Promises about KV that comes out of the arena: who decodes from it goes on as if in place."""

from __future__ import annotations

from collections.abc import Sequence as Items

from backends.api import Sampled
from backends.testing.alike import bounds_of
from backends.testing.bench import STEPS
from backends.testing.carrying import carry, convertible
from backends.testing.desk import Desk, Line
from backends.testing.engine.bench import EngineBench, require_same_texts
from backends.testing.engine.desk import Asked
from backends.testing.form import require

HANDED = (
    "a sequence goes on otherwise after its KV came through the arena than in place; import the "
    "KV of `context` but for the last token, into the right positions, and compute from there"
)


def _handed(bench: EngineBench, prompt: Items[int]) -> tuple[Asked, list[Sampled]]:
    """Prefill and decode through the arena: the prefix, and all its tokens."""
    desk = bench.needs("prefill", "decode")
    asked = desk.done(desk.prefill(prompt, bench.judged))
    desk.output(asked)
    first = asked.first
    later = desk.decode(prompt, [first.token], bench.judged, blocks=asked.blocks, tokens=STEPS - 1)
    desk.until(later, lambda it: it.imported, "imported")
    return asked, [first, *desk.told(later, STEPS - 1)]


def decoding_after_a_handoff_equals_decoding_in_place(bench: EngineBench) -> None:
    """A prefix that crossed the arena is continued as one that did not."""
    texts = []
    for prompt in bench.prompts():
        _, handed = _handed(bench, prompt)
        texts.append((handed, bench.desk.alone(prompt, STEPS, bench.judged)))
        bench.desk.clear()
    require_same_texts(texts, bench.bounds, HANDED)


def a_continued_sequence_is_continued(bench: EngineBench) -> None:
    """A sequence with many generated tokens goes on after exactly those, from the arena or not."""
    desk = bench.needs("decode")
    texts, bounds = [], bench.bounds
    for prompt in bench.prompts(3):
        whole = desk.alone(prompt, 2 * STEPS, bench.judged)
        known = [it.token for it in whole[:STEPS]]
        again = desk.decode(prompt, known, bench.judged, tokens=STEPS)
        texts.append((desk.told(again, STEPS), whole[STEPS:]))
        if "prefill" in desk.info.phases:
            prefix = desk.done(desk.prefill([*prompt, *known[:-1]], bench.judged, seeds=()))
            require(
                not prefix.story.outputs[0].sampled,
                "prefilled: a token was sampled for a prefix without sequences",
            )
            later = desk.decode(prompt, known, bench.judged, blocks=prefix.blocks, tokens=STEPS)
            texts.append((desk.told(later, STEPS), whole[STEPS:]))
        desk.clear()
    otherwise = "decode: tokens that were generated before are not gone on after as they stand"
    require_same_texts(texts, bounds, otherwise)


def sequences_share_a_prefix(bench: EngineBench) -> None:
    """Several sequences are decoded from the same blocks at once, each as if alone."""
    desk = bench.needs("prefill", "decode")
    prompt, seeds = bench.prompts(1)[0], (3, 4, 5)
    asked = desk.done(desk.prefill(prompt, bench.judged, seeds=seeds))
    firsts = desk.output(asked).sampled
    jobs = [
        desk.decode(
            prompt, [it.token], bench.judged, blocks=asked.blocks, seed=seed, tokens=STEPS - 1
        )
        for seed, it in zip(seeds, firsts, strict=True)
    ]
    texts = [
        ([first, *desk.told(job, STEPS - 1)], desk.alone(prompt, STEPS, bench.judged, seed=seed))
        for seed, first, job in zip(seeds, firsts, jobs, strict=True)
    ]
    require_same_texts(texts, bench.bounds, "sequences of one prefix disturb each other")


def the_arena_is_free_once_imported(bench: EngineBench) -> None:
    """What becomes of the blocks after `imported` is nothing to the sequence."""
    texts = []
    desk = bench.needs("prefill", "decode")
    for prompt in bench.prompts(3):
        alone = desk.alone(prompt, STEPS, bench.judged)
        asked = desk.done(desk.prefill(prompt, bench.judged))
        first = desk.output(asked).sampled[0]
        desk.ear.watch = lambda event, _job: desk.fill() if event == "imported" else None
        later = desk.decode(
            prompt, [first.token], bench.judged, blocks=asked.blocks, tokens=STEPS - 1
        )
        texts.append(([first, *desk.told(later, STEPS - 1)], alone))
        require(
            later.story.imported == 1,
            f"imported was said {later.story.imported} times; the arena waits for it",
        )
        desk.clear()
    otherwise = "imported was said while the arena was still to be read; say it after the copy"
    require_same_texts(texts, bench.bounds, otherwise)


def the_reference_continues_what_it_exports(bench: EngineBench) -> None:
    """The reference engine decodes the exported KV as it decodes its own: layout, RoPE, values."""
    desk, reference = bench.needs("prefill"), bench.reference
    _require_convertible(bench, reference)
    texts = []
    for prompt in bench.prompts():
        asked = desk.done(desk.prefill(prompt, bench.judged))
        first = desk.output(asked).sampled[0]
        line = Line(prompt, bench.judged)
        line.take(first)
        reference.cover(line, len(prompt))
        carry(desk.backend, asked.blocks, reference.backend, line.blocks, len(prompt))
        reference.ingest(line.blocks)
        reference.decode([line], STEPS - 1)
        reference.release(line)
        texts.append((line.sampled, reference.run(prompt, STEPS, sampling=bench.judged)))
        desk.clear()
    require_same_texts(
        texts,
        bounds_of(desk.layout, reference.layout),
        "the reference engine goes on otherwise from this engine's KV than from its own; info."
        "layout states another order of axes, heads or RoPE pairing than lies in the arena",
    )


def what_the_reference_exports_is_continued(bench: EngineBench) -> None:
    """KV of the reference engine is decoded as the reference engine decodes it."""
    desk, reference = bench.needs("decode"), bench.reference
    _require_convertible(bench, reference)
    texts = []
    for prompt in bench.prompts():
        theirs = reference.run(prompt, STEPS, sampling=bench.judged)
        line = Line(prompt, bench.judged)
        reference.prefill(line)
        blocks = desk.take(len(prompt))
        carry(reference.backend, line.blocks, desk.backend, blocks, len(prompt))
        reference.release(line)
        first = line.sampled[0]
        later = desk.decode(prompt, [first.token], bench.judged, blocks=blocks, tokens=STEPS - 1)
        texts.append(([first, *desk.told(later, STEPS - 1)], theirs))
        desk.clear()
    require_same_texts(
        texts,
        bounds_of(desk.layout, reference.layout),
        "this engine goes on otherwise from the reference's KV than the reference does; it reads "
        "the arena in another order of axes, heads or RoPE pairing than info.layout states",
    )


def _require_convertible(bench: EngineBench, reference: Desk) -> None:
    reason = convertible(bench.desk.backend, reference.backend)
    require(not reason, f"info.layout: KV cannot be handed over: {reason}")
