"""The smallest part of the matrix: torch and ONNX Runtime, either way, on the real model."""

from __future__ import annotations

import pytest

from backends.testing.desk import Desk
from backends.testing.making import Maker
from tests.bench.engine import bundled_model
from tests.bench.matrix.pair import alone, distance, forced, say_all
from tests.bench.matrix.rows import ENGINES, prompts

pytestmark = pytest.mark.slow

MODEL = {"pool_tokens": 1024, "threads": 1}
TOKENS = 6


@pytest.fixture(scope="module")
def desks():
    """The two engines in float32, with unlike pools."""
    made = {}
    for engine in ENGINES[:2]:
        maker = Maker.of(engine.backend, engine.exact)
        cut = {"block_tokens": 32} if engine.name == "torch" else {}
        made[engine.name] = Desk(maker.make(model=str(bundled_model()), **MODEL, **cut))
    yield made
    for desk in made.values():
        desk.close()


async def test_texts_are_equal_whoever_prefills_and_whoever_decodes(desks):
    questions = prompts(str(bundled_model()), 4)
    torch, onnx = desks["torch"], desks["onnxruntime"]
    texts = alone(torch, questions, TOKENS)
    assert alone(onnx, questions, TOKENS) == texts
    for source, target in ((torch, onnx), (onnx, torch)):
        handed = await say_all(source.backend, target.backend, questions, TOKENS)
        assert handed.texts == texts
        assert handed.nbytes == sum(map(len, questions)) * target.layout.token_bytes


def test_a_pair_in_float32_is_as_near_as_float32_can_be(desks):
    questions = prompts(str(bundled_model()), 2)
    torch, onnx = desks["torch"], desks["onnxruntime"]
    texts = alone(torch, questions, TOKENS)
    measure = forced(torch, torch, questions, texts)
    far = distance(forced(torch, onnx, questions, texts), measure)
    assert far.kl < 1e-6
    assert far.top1 == 1.0
    shifted = [text[1:] + text[:1] for text in texts]
    assert distance(forced(torch, onnx, questions, shifted), measure).kl > 0.01
