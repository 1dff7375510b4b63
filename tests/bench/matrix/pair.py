"""One pair of engines: text through two workers and a transport, distributions token by token."""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from typing import Any

import msgspec

from backends.api import Sampled, Sampling
from backends.testing.alike import apart
from backends.testing.desk import Desk, Line
from backends.testing.site import hand_over, meet, site
from tests.bench.matrix.sides import TELLING, Side
from transfer.plan import plan

GREEDY = Sampling(temperature=0.0, ignore_eos=True)

Texts = list[list[int]]


class Handed(msgspec.Struct, frozen=True):
    """What a pair said, and how it went: seconds are sums over all prompts."""

    texts: Texts
    transport: str
    plan: str
    nbytes: int
    seconds: float
    tokens: int


class Distance(msgspec.Struct, frozen=True):
    """How far from the reference, forced along the same tokens: means over all positions."""

    kl: float
    top1: float


async def say_all(prefill: Any, decode: Any, prompts: Items[list[int]], tokens: int) -> Handed:
    """Carry every prompt through a prefill and a decode worker, one after the other."""
    texts: Texts = []
    async with site() as here:
        settings = {"unlike_weights": True, "reuse": "off", "step_tokens": 512}
        first = await here.start("prefill", prefill, **settings)
        second = await here.start("decode", decode, **settings)
        transport = await meet(first, second)
        began = time.perf_counter()
        for prompt in prompts:
            spec = here.spec(prompt, GREEDY, tokens)
            said = await hand_over(first, second, spec, transport)
            texts.append([it.token for it in said[0]])
        seconds = time.perf_counter() - began
        await first.balanced()
        await second.balanced()
    layout = decode.info.layout
    agreed = plan(prefill.info.layout, layout, allow_unlike_weights=True)
    nbytes = sum(len(prompt) for prompt in prompts) * layout.token_bytes
    return Handed(texts, transport, agreed.line, nbytes, seconds, len(prompts) * tokens)


def alone(desk: Desk, prompts: Items[list[int]], tokens: int) -> Texts:
    """What one engine says by itself."""
    return [[it.token for it in desk.run(prompt, tokens)] for prompt in prompts]


def measured(desk: Desk, prompts: Items[list[int]], texts: Texts) -> list[list[Sampled]]:
    """What one engine gives by itself after each token of `texts`."""
    found = []
    for prompt, text in zip(prompts, texts, strict=True):
        line = Line(prompt, TELLING)
        desk.prefill(line)
        desk.force(line, text)
        found.append(line.sampled[1:])
        desk.release(line)
    return found


def forced(
    source: Side, target: Side, prompts: Items[list[int]], texts: Texts
) -> list[list[Sampled]]:
    """What `target` gives after each token of `texts`, from KV of `source`."""
    return [
        target.along(prompt, text, lambda tokens, blocks: source.give(tokens, target, blocks))
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def distance(ours: list[list[Sampled]], measure: list[list[Sampled]]) -> Distance:
    """Means over all positions of all prompts."""
    pairs = [apart(one, other) for one, other in zip(ours, measure, strict=True)]
    kl = [it.kl for it in pairs if it.kl is not None]
    return Distance(sum(kl) / len(kl), sum(it.top1 for it in pairs) / len(pairs))
