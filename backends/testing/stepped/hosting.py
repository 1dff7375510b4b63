"""Promises that take the real worker: the step loop, the ledger, sockets, a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from backends.api import Sampled, Sampling
from backends.errors import BackendMisconfigured
from backends.protocol import FirstToken, Prefill, Refused
from backends.testing.alike import Bounds, bounds_of, own_bounds, require_alike
from backends.testing.bench import STEPS
from backends.testing.child import left_alone, run_again, run_hanging
from backends.testing.choosing.asking import STRONGEST, context
from backends.testing.desk import Desk
from backends.testing.form import Unproven, require
from backends.testing.site import Site, Turnstile, cancel, hand_over, meet, reserve, say, site
from backends.testing.stepped.bench import SteppedBench

T = TypeVar("T")

STOP_AT = 3
CHUNK = 16
STUCK_EXIT = 70
"""`os.EX_SOFTWARE`: how a worker ends whose step does not return."""


def a_worker_says_what_it_says(bench: SteppedBench) -> None:
    """In a worker that both prefills and decodes, several requests at once get its own words."""

    async def play(here: Site, desk: Desk) -> list[list[Sampled]]:
        wire = await here.start("both", desk.backend, step_tokens=48)
        specs = [here.spec(prompt, bench.greedy, STEPS) for prompt in bench.prompts()]
        found = [await say(wire, spec) for spec in specs]
        await wire.balanced()
        return [[Sampled(it.token) for it in lines[0]] for lines in found]

    _require_text(bench, _in_site(play, bench.desk), "worker: its text is not that of bare steps")


def a_worker_continues_what_another_computed(bench: SteppedBench) -> None:
    """Two workers around it, one that prefills and one that decodes, say what it says alone."""

    async def play(here: Site, desk: Desk) -> list[list[Sampled]]:
        prefill = await here.start("prefill", desk.backend, step_tokens=48)
        decode = await here.start("decode", _twin(bench).backend)
        transport = await meet(prefill, decode)
        specs = [here.spec(prompt, bench.greedy, STEPS) for prompt in bench.prompts()]
        found = [await hand_over(prefill, decode, spec, transport) for spec in specs]
        await prefill.balanced()
        await decode.balanced()
        return [[Sampled(it.token) for it in lines[0]] for lines in found]

    _require_text(
        bench,
        _in_site(play, bench.desk),
        "worker: a text that went from one worker to another is not that of one alone; if "
        "decode_after_handoff_equals_decode_in_place holds, look at when `ready` is called",
    )


def a_worker_continues_what_the_reference_computed(bench: SteppedBench) -> None:
    """Behind a worker of the reference that prefills, it says what the reference says alone."""
    ours, theirs = bench.desk.layout, bench.reference.layout
    if ours.weights != theirs.weights:
        raise Unproven(
            f"its weights are {ours.weights!r}, those of the reference {theirs.weights!r}, and "
            "workers meet only with equal ones unless their operator allows that pair"
        )

    async def play(here: Site, desk: Desk) -> list[list[Sampled]]:
        prefill = await here.start("prefill", bench.reference.backend, step_tokens=48)
        decode = await here.start("decode", desk.backend)
        transport = await meet(prefill, decode)
        specs = [here.spec(prompt, bench.greedy, STEPS) for prompt in bench.prompts()]
        found = [await hand_over(prefill, decode, spec, transport) for spec in specs]
        await decode.balanced()
        return [[Sampled(it.token) for it in lines[0]] for lines in found]

    for prompt, found in zip(bench.prompts(), _in_site(play, bench.desk), strict=True):
        alone = bench.reference.run(prompt, STEPS, sampling=bench.judged)
        _require_words(
            found,
            alone,
            bounds_of(ours, theirs),
            "worker: a text whose prompt the reference computed is not the reference's; if "
            "it_continues_what_the_reference_computed holds, look at `ingest`",
        )


def a_cancel_frees_every_block(bench: SteppedBench) -> None:
    """Whenever a request is cancelled, in the middle of a step too, all of its blocks come free."""
    prompt = max(bench.prompts(), key=len)

    async def play(here: Site, desk: Desk) -> list[Sampled]:
        gates = Turnstile(desk.backend), Turnstile(_twin(bench).backend)
        wires = (
            await here.start("prefill", gates[0], step_tokens=CHUNK),
            await here.start("decode", gates[1]),
        )
        transport = await meet(*wires)
        points = [(0, 0), *((0, it) for it in range(1, max(2, len(prompt) // CHUNK)))]
        points += [(1, 1), (1, 3)]
        for side, steps in points:
            spec = here.spec(prompt, bench.greedy, 4 * STEPS)
            landing = await reserve(*wires, spec, transport)
            if steps:
                gates[side].hold(steps)
                wires[0].send(Prefill(spec=spec, landing=landing))
                await gates[side].held()
            await cancel(spec, *wires, meanwhile=gates[side].let_pass)
        lines = await hand_over(*wires, here.spec(prompt, bench.greedy, STEPS), transport)
        return [Sampled(it.token) for it in lines[0]]

    found = _in_site(play, bench.desk)
    alone = bench.desk.run(prompt, STEPS, sampling=bench.judged)
    _require_words(found, alone, own_bounds(bench.info), "worker: after cancels a text is another")


def sequences_end_where_they_are_told(bench: SteppedBench) -> None:
    """End tokens, stop ids, `min_tokens` and `max_tokens` end a sequence where they say."""
    info = bench.desk.info
    prompt = context(bench.info)
    text = [it.token for it in bench.desk.run(prompt, STEPS, sampling=bench.judged)]
    cases = [(bench.greedy, STOP_AT, STOP_AT, "length")]
    if "stop_token_ids" in info.sampling:
        at = next((it for it in range(1, STEPS) if text[it] not in text[:it]), 0)
        stops = Sampling(temperature=0.0, stop_token_ids=(text[at],), ignore_eos=_ignores(bench))
        cases.append((stops, STEPS, at + 1, "stop"))
    if info.end_tokens and "logit_bias" in info.sampling and not info.emulated:
        bias = {info.end_tokens[0]: STRONGEST}
        cases.append((Sampling(temperature=0.0, logit_bias=bias), STEPS, 1, "stop"))
        if _ignores(bench):
            deaf = Sampling(temperature=0.0, logit_bias=bias, ignore_eos=True)
            cases.append((deaf, STOP_AT, STOP_AT, "length"))
        if "min_tokens" in info.sampling:
            late = Sampling(temperature=0.0, logit_bias=bias, min_tokens=2)
            cases.append((late, STEPS, 3, "stop"))

    async def play(here: Site, desk: Desk) -> None:
        wire = await here.start("both", desk.backend)
        for sampling, most, length, reason in cases:
            lines = await say(wire, here.spec(prompt, sampling, most))
            found = len(lines[0]), lines[0][-1].finish
            require(
                found == (length, reason),
                f"worker: a sequence ended after {found[0]} tokens with {found[1]!r}, not after "
                f"{length} with {reason!r}: {sampling}",
            )
        await wire.balanced()

    _in_site(play, bench.desk)


def _ignores(bench: SteppedBench) -> bool:
    return "ignore_eos" in bench.desk.info.sampling


def a_worker_refuses_what_it_cannot_do(bench: SteppedBench) -> None:
    """More than it holds or reads, and parameters that it does not declare, are refused by name."""
    info = bench.desk.info
    longest = min(info.context_tokens, info.pool_blocks * info.layout.block_tokens)

    async def play(here: Site, desk: Desk) -> None:
        wire = await here.start("both", desk.backend)
        wrong = [here.spec([0] * (longest + 1), Sampling(), 2), here.spec([], Sampling(), 2)]
        wrong.append(here.spec([info.vocabulary], Sampling(), 2))
        missing = {"top_k": 3, "min_tokens": 2, "logprobs": 1, "presence_penalty": 1.0}
        wrong += [
            here.spec([0], msgspec.convert({name: value}, Sampling), 2)
            for name, value in missing.items()
            if name not in info.sampling
        ]
        for spec in wrong:
            wire.send(Prefill(spec=spec, decode_here=True))
            refused: Refused = await wire.hear(Refused, FirstToken)
            require(
                isinstance(refused, Refused) and refused.kind == "invalid",
                "worker: it took a request that it cannot do",
            )
        await wire.balanced()

    _in_site(play, bench.desk)


def in_a_new_process_it_computes_the_same(bench: SteppedBench) -> None:
    """Started anew it says what it said, and when it is closed its process ends, all of it."""
    prompts = bench.prompts(3)
    expected = [bench.desk.run(prompt, STEPS, sampling=bench.judged) for prompt in prompts]
    found = run_again(bench.maker, prompts, STEPS, bench.judged)
    for ours, right in zip(found, expected, strict=True):
        require_alike(
            ours, right, own_bounds(bench.info), "a new process: it computes something else there"
        )


def a_worker_whose_step_hangs_ends(bench: SteppedBench) -> None:
    """A worker whose step does not return ends its process, and all that the plug-in started."""
    code, group = run_hanging(bench.maker, context(bench.info))
    require(
        code == STUCK_EXIT,
        f"a hanging step: the worker ended with {code}, not {STUCK_EXIT}; release the lock of the "
        "interpreter while the device computes, and handle no signals",
    )
    left_alone(group)


def _twin(bench: SteppedBench) -> Desk:
    try:
        return bench.another()
    except (MemoryError, BackendMisconfigured) as error:
        raise Unproven(f"it cannot be made twice in one process: {error}") from error


def _in_site(play: Callable[[Site, Desk], Awaitable[T]], desk: Desk) -> T:
    """What `play` gives on a site of its own."""

    async def run() -> T:
        async with site() as here:
            return await play(here, desk)

    try:
        return asyncio.run(run())
    except ExceptionGroup as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from group


def _require_text(bench: SteppedBench, found: list[list[Sampled]], otherwise: str) -> None:
    for prompt, ours in zip(bench.prompts(), found, strict=True):
        alone = bench.desk.run(prompt, STEPS, sampling=bench.judged)
        _require_words(ours, alone, own_bounds(bench.info), otherwise)


def _require_words(
    ours: list[Sampled], alone: list[Sampled], bounds: Bounds, otherwise: str
) -> None:
    """The same text; after a near tie, what follows is another text and is not compared."""
    for place, (one, other) in enumerate(zip(ours, alone, strict=True)):
        if one.token != other.token:
            require_alike(ours[: place + 1], alone[: place + 1], bounds, otherwise)
            return
