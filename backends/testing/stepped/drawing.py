"""Promises about random numbers: `rng` "positional" means that a text is a function of its seed."""

from __future__ import annotations

import msgspec

from backends.api import Sampling
from backends.testing.alike import own_bounds
from backends.testing.bench import STEPS
from backends.testing.choosing.asking import DRAWS, HOT, context, odds
from backends.testing.desk import Desk, Line
from backends.testing.form import Unproven, require
from backends.testing.stepped.bench import SteppedBench

FLAT = 1e6
"""A temperature at which a random number alone decides, whatever the logits."""

FEW = (0.0, 0.0, 0.0, 0.0)


def seeds_repeat_and_differ(bench: SteppedBench) -> None:
    """`rng` "positional": equal seeds repeat, whatever is beside them; unlike ones differ."""
    desk = _positional(bench)
    prompt = context(desk.info)
    hot = _as_random_as(HOT, desk)
    first = [it.token for it in bench.choose(hot, prompt, seeds=range(DRAWS))]
    again = [it.token for it in bench.choose(hot, prompt, seeds=range(DRAWS)[::-1])][::-1]
    require(
        first == again,
        'info.rng is "positional", but a seed gives another token beside others; compute the '
        'random number from seed and position alone, or state "engine"',
    )
    require(len(set(first)) > 1, "rng: all seeds give the same token; the draw must use the seed")
    large = bench.choose(hot, prompt, seeds=[(1 << 63) - 1, (1 << 62) + 11, 11])
    require(len(large) == 3, "rng: seeds have up to 63 bits")


def positions_draw_anew(bench: SteppedBench) -> None:
    """The random number depends on the position: a seed does not repeat one along a text."""
    desk = _positional(bench)
    drawn = desk.run(context(desk.info), 2 * STEPS, sampling=_as_random_as(FLAT, desk), seed=5)
    kinds = len({it.token for it in drawn})
    require(
        kinds > 2,
        f"rng: {2 * STEPS} positions of one seed gave {kinds} kinds of tokens; use the position "
        "len(prompt) + len(generated) too",
    )


def a_seeded_text_goes_on_elsewhere(bench: SteppedBench) -> None:
    """Seeded sampling after a handoff, and after a prefill of generated tokens, draws the same."""
    desk = _positional(bench)
    prompt = context(desk.info)
    warm = msgspec.structs.replace(
        _among_few(bench, prompt), ignore_eos="ignore_eos" in desk.info.sampling
    )
    text = [it.token for it in desk.run(prompt, STEPS, sampling=warm, seed=9)]
    right = 0
    for cut in range(1, STEPS):
        line = Line(prompt, warm, seed=9)
        line.generated.extend(text[:cut])
        desk.prefill(line)
        arrived = bench.hand_over(desk, line, desk)
        right += arrived.generated[cut] == text[cut]
        if arrived.generated == text[: cut + 1]:
            desk.decode([arrived], min(2, STEPS - cut - 1))
            right += arrived.generated == text[: len(arrived.generated)]
        desk.release(line, arrived)
    least = own_bounds(desk.info).top1 * 2 * (STEPS - 1)
    require(
        right >= least,
        f"rng: a text that was taken up again went on as it had in {right} of {2 * (STEPS - 1)} "
        "looks; draw by seed and position, never by how often was drawn",
    )


def _as_random_as(temperature: float, desk: Desk) -> Sampling:
    return Sampling(temperature=temperature if "temperature" in desk.info.sampling else 1.0)


def _among_few(bench: SteppedBench, prompt: list[int]) -> Sampling:
    """Drawn among so few tokens that rounding hardly ever makes another of one, where that goes."""
    try:
        return odds(bench, prompt, FEW).sampling()
    except Unproven:
        return Sampling()


def _positional(bench: SteppedBench) -> Desk:
    if bench.desk.info.rng != "positional":
        raise Unproven('info.rng is "engine": nothing is said of seeds')
    return bench.desk
