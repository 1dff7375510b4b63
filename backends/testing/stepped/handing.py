"""Promises about KV that came from somewhere else, or goes there: the reason for all of this."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import msgspec

from backends.api import Sampled
from backends.errors import BackendMisconfigured
from backends.testing.alike import Bounds, bounds_of, own_bounds, require_alike, within
from backends.testing.bench import STEPS
from backends.testing.carrying import Stated, carry, convertible
from backends.testing.desk import Desk, Line
from backends.testing.form import Unproven, require
from backends.testing.stepped.bench import SteppedBench
from backends.testing.stepped.computing import forced
from transfer.layout import KVLayout

PROMPTS = 4

OFFERS: dict[str, tuple[Any, ...]] = {
    "axes": (
        "block layer kv head token dim",
        "layer kv block token head dim",
        "layer block kv token head dim",
        "block kv layer token head dim",
    ),
    "block_tokens": (8, 16, 32, 64),
    "rope": ("half", "interleaved"),
    "kv_dtype": ("float32", "float16", "bfloat16"),
    "shards": (2,),
}
"""Options by which plug-ins offer other layouts, and what is tried of them. What is refused with
`BackendMisconfigured` is not offered."""


def decode_after_handoff_equals_decode_in_place(bench: SteppedBench) -> None:
    """A prefix that was handed over, into blocks used before, continues like one left in place."""
    desk = bench.desk
    for prompt in bench.prompts(PROMPTS):
        line = bench.line(prompt)
        desk.prefill(line)
        arrived = bench.hand_over(desk, line, desk)
        desk.decode([line], STEPS)
        _require_continued(
            desk,
            arrived,
            line,
            own_bounds(desk.info),
            f"handoff: a prompt of {len(prompt)} tokens continues otherwise once its KV came "
            "through another worker; compute from what lies in the pool, and have `ingest` bring "
            "it to the device",
        )


def kv_survives_every_layout(bench: SteppedBench) -> None:
    """KV that went through pools cut in other ways comes back as it was."""
    desk = bench.desk
    prompt = bench.prompts(1)[0]
    for layout in _foreign(desk.layout):
        line, back = bench.line(prompt), bench.line(prompt)
        desk.prefill(line)
        there = Stated(desk.backend, layout, fresh=True)
        blocks = list(range(layout.blocks_for(len(prompt))))[::-1]
        carry(desk.backend, line.blocks, there, blocks, len(prompt))
        desk.cover(back, len(prompt))
        carry(there, blocks, desk.backend, back.blocks, len(prompt))
        desk.ingest(back.blocks)
        back.generated.extend(line.generated)
        desk.decode([line], STEPS)
        _require_continued(
            desk,
            back,
            line,
            own_bounds(desk.info),
            f"handoff: KV that went through a pool {layout.axes!r} of {layout.block_tokens} tokens "
            "a block, and back, is not what it was",
        )


def _foreign(layout: KVLayout) -> Iterator[KVLayout]:
    for axes in OFFERS["axes"]:
        if set(axes.split()) == set(layout.order) and axes != layout.axes:
            other = 32 if layout.block_tokens != 32 else 16
            yield msgspec.structs.replace(layout, axes=axes, block_tokens=other, shard=None)
    if layout.planes == 2 and not layout.head_dim % 2:
        rope = "half" if layout.rope == "interleaved" else "interleaved"
        yield msgspec.structs.replace(layout, rope=rope, shard=None)


def logits_agree_with_the_reference(bench: SteppedBench) -> None:
    """What it computes of a prompt, alone, is what the reference engine computes."""
    desk, reference = bench.desk, bench.reference
    bounds = bounds_of(desk.layout, reference.layout)
    for prompt in bench.prompts(PROMPTS):
        theirs = reference.run(prompt, STEPS, sampling=bench.judged)
        ours = forced(desk, bench.line(prompt), [it.token for it in theirs])
        require_alike(
            ours,
            theirs,
            bounds,
            f"step: after a prompt of {len(prompt)} tokens the logits are not those of the "
            "reference; that is the model itself (weights, norms, RoPE, attention), no handoff yet",
        )


def it_continues_what_the_reference_computed(bench: SteppedBench) -> None:
    """KV of the reference, handed over, is decoded as the reference decodes it: layout and RoPE."""
    _from_to(bench, bench.reference, bench.desk)


def the_reference_continues_what_it_computed(bench: SteppedBench) -> None:
    """KV that it computed, handed over, is decoded by the reference as its own: layout and RoPE."""
    _from_to(bench, bench.desk, bench.reference)


def _from_to(bench: SteppedBench, source: Desk, target: Desk) -> None:
    reference = bench.reference
    bounds = bounds_of(source.layout, target.layout)
    for prompt in bench.prompts(PROMPTS):
        expected = reference.run(prompt, STEPS + 1, sampling=bench.judged)
        line = bench.line(prompt)
        source.prefill(line)
        arrived = bench.hand_over(source, line, target)
        found = _along(target, arrived, expected)
        target.release(arrived)
        if not within(found, expected[1:], bounds):
            require_alike(found, expected[1:], bounds, _diagnosis(bench, source, target, bounds))
        source.release(line)


def _along(desk: Desk, arrived: Line, expected: list[Sampled]) -> list[Sampled]:
    """Decode what arrived along what was expected; answers with what is sampled."""
    desk.force(arrived, [it.token for it in expected[:-1]])
    return arrived.sampled


def _require_continued(
    desk: Desk, arrived: Line, line: Line, bounds: Bounds, otherwise: str
) -> None:
    """`arrived` decodes along `line`, which was decoded for `STEPS` tokens, like it."""
    desk.force(arrived, line.generated[:-1])
    require_alike(arrived.sampled, line.sampled[1:], bounds, otherwise)
    desk.release(arrived, line)


def _diagnosis(bench: SteppedBench, source: Desk, target: Desk, bounds: Bounds) -> str:
    """What is wrong with the stated layout, found by trying others."""
    ours = bench.desk
    for wrong, layout in _restated(ours.layout):
        stated = Stated(ours.backend, layout)
        holders = [stated if it is ours else it.backend for it in (source, target)]
        if convertible(holders[0], holders[1]):
            continue
        prompt = bench.prompts(1)[0]
        expected = bench.reference.run(prompt, STEPS + 1, sampling=bench.judged)
        line, arrived = bench.line(prompt), bench.line(prompt)
        source.prefill(line)
        target.cover(arrived, len(prompt))
        carry(holders[0], line.blocks, holders[1], arrived.blocks, len(prompt))
        target.ingest(arrived.blocks)
        arrived.generated.append(expected[0].token)
        found = _along(target, arrived, expected)
        source.release(line)
        target.release(arrived)
        if within(found, expected[1:], bounds):
            return f"info.layout.{wrong}"
    return (
        "info.layout: the pool is not cut as stated, nor by another pairing or with two axes "
        "exchanged; look at how K and V are written, and that K is stored after RoPE"
    )


def _restated(layout: KVLayout) -> Iterator[tuple[str, KVLayout]]:
    """Statements near by, and what they would mean."""
    rope = "half" if layout.rope == "interleaved" else "interleaved"
    yield (
        f"rope: the pool is {rope!r}, not {layout.rope!r} as stated",
        msgspec.structs.replace(layout, rope=rope),
    )
    axes = layout.axes.split()
    places = [it for it, axis in enumerate(axes) if axis not in ("dim", "|")]
    for one, other in itertools.combinations(places, 2):
        moved = list(axes)
        moved[one], moved[other] = axes[other], axes[one]
        text = " ".join(moved)
        yield (
            f"axes: the pool is {text!r}, not {layout.axes!r} as stated",
            msgspec.structs.replace(layout, axes=text),
        )


def every_layout_it_offers_is_true(bench: SteppedBench) -> None:
    """With each layout that its options offer it states that one, and meets its own pools in it."""
    offered = 0
    for option, values in OFFERS.items():
        if not bench.maker.takes(option):
            continue
        for value in values:
            if value == bench.maker.options.get(option, getattr(bench.desk.layout, option, None)):
                continue
            try:
                other = bench.another(**{option: value})
            except BackendMisconfigured:
                continue
            offered += 1
            _meet(bench, other, f"{option}={value}", option, value)
            bench.let_go(other)
    if not offered:
        raise Unproven("it has none of the options " + ", ".join(OFFERS))


def _meet(bench: SteppedBench, other: Desk, what: str, option: str, value: Any) -> None:
    stated = {
        "kv_dtype": other.layout.dtype,
        "shards": max(1, len(other.info.shards)),
    }.get(option, getattr(other.layout, option, None))
    require(stated == value, f"{what}: info.layout states {stated!r}")
    desk = bench.desk
    bounds = bounds_of(desk.layout, other.layout)
    prompt = bench.prompts(1)[0]
    for source, target in ((desk, other), (other, desk)):
        line = bench.line(prompt)
        source.prefill(line)
        arrived = bench.hand_over(source, line, target)
        source.decode([line], STEPS)
        target.force(arrived, line.generated[:-1])
        way = "to" if source is desk else "from"
        require_alike(
            arrived.sampled,
            line.sampled[1:],
            bounds,
            f"{what}: KV that was handed over {way} a pool made with it is decoded otherwise",
        )
        source.release(line)
        target.release(arrived)
