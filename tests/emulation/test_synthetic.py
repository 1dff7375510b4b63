"""The backend without weights keeps its promises: pure tokens, honest KV, a steady pace."""

from __future__ import annotations

import numpy as np
import pytest

from backends.api import Row, Sampling, Sequence
from backends.emulation import pace
from backends.emulation.synthetic import SyntheticBackend
from backends.errors import BackendMisconfigured, StepFailed

PROMPT = list(range(7, 77))


def nothing_ready(row: int, layer: int) -> None:
    """No layer is pushed in these tests."""


def sequence(prompt=PROMPT, seed=1, **sampling) -> Sequence:
    return Sequence(prompt=prompt, generated=[], sampling=Sampling(**sampling), seed=seed)


def make(**options) -> SyntheticBackend:
    return SyntheticBackend(**{"pool_tokens": 4096, **options})


def prefill(backend, one, blocks, chunk=1000) -> int:
    for start in range(0, len(one.prompt), chunk):
        tokens = one.prompt[start : start + chunk]
        last = start + len(tokens) == len(one.prompt)
        row = Row(tokens=tokens, start=start, blocks=blocks, sequences=(one,) if last else ())
        outputs = backend.step([row], nothing_ready)
    return outputs[0].sampled[0].token


def decode(backend, ones, tables, count) -> None:
    for _ in range(count):
        rows = [
            Row(
                tokens=one.generated[-1:],
                start=len(one.prompt) + len(one.generated) - 1,
                blocks=table,
                sequences=(one,),
            )
            for one, table in zip(ones, tables, strict=True)
        ]
        for one, output in zip(ones, backend.step(rows, nothing_ready), strict=True):
            one.generated.append(output.sampled[0].token)


def generated(backend, blocks, *, chunk=1000, seed=1, count=20) -> list[int]:
    one = sequence(seed=seed)
    one.generated.append(prefill(backend, one, blocks, chunk))
    decode(backend, [one], [blocks], count)
    return one.generated


def canonical(backend) -> np.ndarray:
    layout, words = backend.info.layout, backend.info.layout.axes.split()
    pool = backend.pool.view("u4" if layout.dtype == "float32" else "u2")
    pool = pool.reshape(tuple(layout.sizes(backend.info.pool_blocks).values()))
    order = ("block", "token", "layer", "kv", "head", "dim")
    return pool.transpose([words.index(axis) for axis in order])


def test_tokens_depend_on_prompt_seed_and_position_only():
    blocks = list(range(16))
    tokens = generated(make(), blocks)
    assert tokens == generated(make(axes="layer kv block head token dim"), blocks, chunk=7)
    assert tokens != generated(make(), blocks, seed=2)
    assert len(set(tokens)) > 15


def test_kv_is_the_same_whatever_the_chunks_and_whoever_wrote_it():
    whole, pieces = make(), make()
    generated(whole, list(range(16)))
    generated(pieces, list(range(16)), chunk=9)
    assert (whole.pool == pieces.pool).all()
    assert whole.pool.any()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_prefix_copied_to_another_pool_is_recognised_and_a_changed_number_is_not(dtype):
    source = make(dtype=dtype)
    target = make(dtype=dtype, axes="token layer kv block head dim", verify_kv=True)
    one, blocks = sequence(), list(range(5, 12))
    one.generated.append(prefill(source, one, blocks))
    canonical(target)[blocks] = canonical(source)[blocks]
    decode(target, [one], [blocks], 3)
    for layer in (0, 1):
        again = sequence()
        again.generated.append(one.generated[0])
        canonical(target)[6, 3, layer, 1, 0, 5] ^= 1
        with pytest.raises(StepFailed, match=f"position 19 in layer {layer}"):
            decode(target, [again], [blocks], 1)
        canonical(target)[6, 3, layer, 1, 0, 5] ^= 1


@pytest.mark.parametrize("part", ["layers", "heads", "pages", "keys and values"])
def test_parts_of_a_prefix_that_changed_places_are_noticed(part):
    backend = make(verify_kv=True)
    one, blocks = sequence(), list(range(5, 12))
    one.generated.append(prefill(backend, one, blocks))
    view = canonical(backend)
    swapped = {
        "layers": view[:, :, ::-1],
        "heads": view[:, :, :, :, ::-1],
        "pages": view[[*range(5), 6, 5, *range(7, len(view))]],
        "keys and values": view[:, :, :, ::-1],
    }[part].copy()
    view[:] = swapped
    fresh = sequence()  # one that this backend has not seen
    fresh.generated.append(one.generated[0])
    with pytest.raises(StepFailed, match="is not that of its tokens"):
        decode(backend, [fresh], [blocks], 1)


def test_a_copied_block_serves_a_sequence_of_its_own():
    backend = make(verify_kv=True)
    one, other = sequence(), sequence(seed=9)
    first = prefill(backend, one, [0, 1, 2, 3, 4])
    backend.copy_blocks([(4, 5)])
    one.generated.append(first)
    other.generated.append(first)
    decode(backend, [one, other], [[0, 1, 2, 3, 4], [0, 1, 2, 3, 5]], 5)
    assert one.generated != other.generated


class Clock:
    """Time that passes when somebody sleeps, or works on it."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(pace, "time", made)
    return made


def test_layers_are_reported_in_order_while_the_prefill_lasts(clock):
    backend = make(layers=4, prefill_seconds_per_token=0.0005)
    seen: list[tuple[float, int]] = []
    started = clock.now
    row = Row(tokens=PROMPT + PROMPT, start=0, blocks=list(range(10)))
    backend.step([row], lambda index, layer: seen.append((clock.now - started, layer)))
    assert [layer for _, layer in seen] == [0, 1, 2, 3]
    assert [when for when, _ in seen] == pytest.approx([0.0175, 0.035, 0.0525, 0.07])
    assert clock.now - started == pytest.approx(0.07)


def test_steps_tick_at_absolute_times_though_the_host_works_between_them(clock):
    backend = make(step_seconds=0.02)
    one = sequence()
    one.generated.append(prefill(backend, one, list(range(16))))
    started = clock.now
    for _ in range(10):
        decode(backend, [one], [list(range(16))], 1)
        clock.sleep(0.004)
    assert clock.now - started == pytest.approx(10 * 0.02 + 0.004)


def test_asked_for_logprobs_come_with_alternatives():
    backend = make()
    one = sequence(logprobs=3)
    row = Row(
        tokens=PROMPT,
        start=0,
        blocks=list(range(8)),
        sequences=(one,),
        prompt_logprobs=2,
        following=PROMPT[1:],
    )
    (output,) = backend.step([row], nothing_ready)
    logprob = output.sampled[0].logprob
    assert logprob is not None
    assert len(logprob.top) == 3
    assert logprob.top[0] == (output.sampled[0].token, logprob.logprob)
    assert [entry.token for entry in output.prompt_logprobs] == PROMPT[1:]
    assert all(len(entry.top) == 2 for entry in output.prompt_logprobs)


def test_min_tokens_keeps_end_and_stop_tokens_away():
    backend = make(vocabulary=3, end_tokens=(0,))
    one = sequence(prompt=[1, 2, 1, 2], min_tokens=40, stop_token_ids=(1,))
    one.generated.append(prefill(backend, one, list(range(8))))
    decode(backend, [one], [list(range(8))], 60)
    assert set(one.generated[:40]) == {2}
    assert len(set(one.generated[40:])) > 1


def test_a_table_that_does_not_cover_its_row_fails_the_step():
    backend = make()
    for blocks in ([], [0], [0, 1, 2, 3, 999], [0, 1, 2, 3, -1]):
        with pytest.raises(StepFailed, match="blocks"):
            backend.step([Row(tokens=PROMPT, start=0, blocks=blocks)], nothing_ready)


@pytest.mark.parametrize(
    ("tokens", "start"), [([], 0), ([1], -1), ([1, 2], 8191), ([-1], 0), ([5, 49152], 0)]
)
def test_a_row_that_the_model_could_not_compute_fails_the_step(tokens, start):
    with pytest.raises(StepFailed, match="row 0"):
        make().step([Row(tokens=tokens, start=start, blocks=list(range(256)))], nothing_ready)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("layers", 0),
        ("kv_heads", -1),
        ("head_dim", 4),
        ("dtype", "int4"),
        ("block_tokens", 1000),
        ("block_tokens", "16"),
        ("axes", "block layer"),
        ("pool_tokens", 3),
        ("vocabulary", 1),
        ("context_tokens", 0),
        ("step_seconds", -1.0),
        ("step_seconds", float("nan")),
        ("prefill_seconds_per_token", "fast"),
        ("end_tokens", (99999,)),
        ("end_tokens", 2),
        ("verify_kv", "yes"),
        ("max_batch", 0),
    ],
)
def test_a_bad_option_is_named(option, value):
    with pytest.raises(BackendMisconfigured, match=option):
        make(**{option: value})
