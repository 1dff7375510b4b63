"""Promises about the tokens, and about jobs beside each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from backends.api import Sampled, Sampling
from backends.errors import PoolExhausted
from backends.testing.bench import STEPS
from backends.testing.choosing.asking import STRONGEST
from backends.testing.engine.bench import EngineBench, require_same_texts
from backends.testing.engine.desk import Asked, EngineDesk
from backends.testing.form import Unproven, require

LONG_TOKENS = 200
"""What is asked for where a text must not end by itself."""

MOST_TOKENS = 1 << 16
"""So many are computed at most to fill an engine's memory."""


def every_token_is_told(bench: EngineBench) -> None:
    """A sequence is told to its last token, whatever lies beyond, with what was asked for."""
    desk = bench.needs("decode")
    for prompt in bench.prompts(3):
        asked = desk.decode(prompt, (), bench.judged, tokens=STEPS)
        tokens = desk.told(asked, STEPS)
        wrong = [it.token for it in tokens if not 0 <= it.token < desk.info.vocabulary]
        require(not wrong, f"decoded: {wrong} are not in the vocabulary")
        wanted = bench.judged.logprobs
        for it in tokens:
            require(
                (it.logprob is not None) == (wanted is not None),
                "decoded: log probabilities are given when, and only when, they are asked for",
            )
    whole = desk.alone(prompt, STEPS, bench.judged)
    first = desk.alone(prompt, 1, bench.judged)
    require_same_texts(
        [(first, whole[:1])], bench.bounds, "decode: another first token for a shorter text"
    )


def it_ends_only_where_it_may(bench: EngineBench) -> None:
    """A token at which it ends by itself is told; at what it is to ignore it goes on."""
    desk = bench.needs("decode")
    info, prompt = desk.info, bench.prompts(1)[0]
    if "stop_token_ids" in info.sampling:
        text = [it.token for it in desk.alone(prompt, STEPS, bench.judged)]
        at = max(it for it in range(STEPS) if text[it] not in text[:it])
        stops = msgspec.structs.replace(bench.judged, stop_token_ids=(text[at],))
        desk.told(desk.decode(prompt, (), stops, tokens=STEPS), at + 1)
    if info.emulated or not info.end_tokens or "logit_bias" not in info.sampling:
        return
    bias = {info.end_tokens[0]: STRONGEST}
    for ignored in (False, True) if "ignore_eos" in info.sampling else (False,):
        wanted = Sampling(temperature=0.0, logit_bias=bias, ignore_eos=ignored)
        job = desk.decode(prompt, (), wanted, tokens=STEPS)
        tokens = desk.told(job, STEPS if ignored else 1)
        require(
            tokens[-1].token == info.end_tokens[0],
            f"decoded: ignore_eos {ignored}, and the likeliest token by far, which ends a "
            "sequence, was not told",
        )


def jobs_do_not_change_each_other(bench: EngineBench) -> None:
    """What is computed and generated does not depend on what is beside it."""
    desk = bench.desk
    texts: list[tuple[list[Sampled], list[Sampled]]] = []
    prompts = bench.prompts(4)
    room = min(desk.info.context_tokens, _capacity(desk) // 4) - max(map(len, prompts))
    for begin in _ways(bench, max(STEPS, min(room, LONG_TOKENS))):  # none ends while others begin
        alone = [desk.tokens(begin(prompt), STEPS) for prompt in prompts]
        jobs = [begin(prompt) for prompt in prompts]
        for job in jobs:
            desk.until(job, lambda it: it.outputs or len(it.tokens) >= STEPS, f"token {STEPS}")
        together = [desk.tokens(job, STEPS) for job in jobs]
        texts += zip(together, alone, strict=True)
    message = "jobs beside each other have each other's tokens or KV"
    require_same_texts(texts, bench.bounds, message)


def _capacity(desk: EngineDesk) -> int:
    """Tokens that its memory holds."""
    return desk.info.engine_blocks * desk.layout.block_tokens


def _ways(bench: EngineBench, tokens: int) -> Iterator[Callable[[list[int]], Asked]]:
    """How to have something computed, by what the engine does."""
    desk = bench.desk
    if "decode" in desk.info.phases:
        yield lambda prompt: desk.decode(prompt, (), bench.judged, tokens=tokens)
    if "prefill" in desk.info.phases:
        yield lambda prompt: desk.prefill(prompt, bench.judged, export=False)


def a_seed_gives_its_text_again(bench: EngineBench) -> None:
    """With `rng` "positional" the same seed gives the same text, and another one another."""
    desk = bench.needs("decode")
    if desk.info.rng != "positional":
        raise Unproven("info.rng: it does not say that a seed gives a text")
    drawn = bench.drawn
    prompt = bench.prompts(1)[0]
    one, again, other = (desk.alone(prompt, 2 * STEPS, drawn, seed=seed) for seed in (5, 5, 6))
    tokens = [[it.token for it in text] for text in (one, again, other)]
    require(tokens[0] == tokens[1], 'decode: a seed gave two texts; state rng "engine"')
    require(tokens[0] != tokens[2], "decode: two seeds gave one text; take `sequence.seed`")


def nothing_is_found_under_another_salt(bench: EngineBench) -> None:
    """KV that is kept for one salt is not used under another, nor without one."""
    desk = bench.needs("prefill")
    prompt = bench.prompts(1, 120)[0]
    for salt in (b"one", b"one", b"two", b"", b""):
        asked = desk.done(desk.prefill(prompt, bench.judged, salt=salt))
        if salt != b"one":
            require(
                not asked.story.cached,
                f"prefilled: {asked.story.cached} tokens were found under the salt {salt!r}, where "
                "nobody has put them; keep KV apart by `job.salt`, and none without one",
            )
        desk.clear()


def more_than_fits_waits_or_is_refused(bench: EngineBench) -> None:
    """Jobs beyond the engine's memory wait, or fail with `PoolExhausted`; none is forgotten."""
    desk = bench.desk
    capacity = desk.info.engine_blocks
    size = desk.layout.block_tokens
    length = max(size, min(desk.info.context_tokens - STEPS - 1, capacity * size // 3))
    count = 2 + 2 * capacity // desk.layout.blocks_for(length)
    if count * length > MOST_TOKENS:
        raise Unproven(f"its memory of {capacity} blocks is too large to be filled here")
    begin = next(_ways(bench, 2))
    prompts = [[(at + it) % desk.info.vocabulary for it in range(length)] for at in range(count)]
    for asked in [begin(prompt) for prompt in prompts]:
        _require_waited(desk, asked)


def _require_waited(desk: EngineDesk, asked: Asked) -> None:
    story = asked.story

    def over() -> bool:
        return len(story.tokens) >= 2 or bool(story.outputs or story.ended)

    desk.ear.wait(over, desk.patience)
    desk.abort(asked)
    desk.end(asked)
    wrong = [it for it in story.errors if not isinstance(it, PoolExhausted)]
    require(not wrong, f"failed: {wrong} for lack of memory; make it a PoolExhausted")
    require(
        story.errors or story.outputs or len(story.tokens) >= 2,
        f"{story.name} ended without its tokens when memory was short; it may wait or fail",
    )
