"""The smallest part of the matrix: torch and ONNX Runtime, either way, on the real model."""

from __future__ import annotations

import pytest

from backends.emulation.synthetic import SyntheticBackend
from backends.testing.making import Maker
from tests.bench.engine import bundled_model
from tests.bench.matrix.pair import alone, distance, forced, measured, say_all
from tests.bench.matrix.rows import ENGINES, prompts
from tests.bench.matrix.sides import EngineSide, SteppedSide
from tests.engine.desk import SMALL
from tests.engine.small import SmallEngine
from tests.life.cluster import SHAPE

pytestmark = pytest.mark.slow


MODEL = {"pool_tokens": 1024, "threads": 1}
TOKENS = 6


@pytest.fixture(scope="module")
def sides():
    """The two engines in float32, with unlike pools."""
    made = {}
    for engine in ENGINES[:2]:
        maker = Maker.of(engine.backend, engine.exact)
        cut = {"block_tokens": 32} if engine.name == "torch" else {}
        made[engine.name] = SteppedSide(maker.make(model=str(bundled_model()), **MODEL, **cut))
    yield made
    for side in made.values():
        side.close()


async def test_texts_are_equal_whoever_prefills_and_whoever_decodes(sides):
    questions = prompts(str(bundled_model()), 4)
    torch, onnx = sides["torch"], sides["onnxruntime"]
    texts = alone(torch.desk, questions, TOKENS)
    assert alone(onnx.desk, questions, TOKENS) == texts
    for source, target in ((torch, onnx), (onnx, torch)):
        handed = await say_all(source.backend, target.backend, questions, TOKENS)
        assert handed.texts == texts
        assert handed.nbytes == sum(map(len, questions)) * target.info.layout.token_bytes


def test_a_pair_in_float32_is_as_near_as_float32_can_be(sides):
    questions = prompts(str(bundled_model()), 2)
    torch, onnx = sides["torch"], sides["onnxruntime"]
    texts = alone(torch.desk, questions, TOKENS)
    measure = measured(torch.desk, questions, texts)
    far = distance(forced(torch, onnx, questions, texts), measure)
    assert far.kl < 1e-6
    assert far.top1 == 1.0
    shifted = [text[1:] + text[:1] for text in texts]
    assert distance(forced(torch, onnx, questions, shifted), measure).kl > 0.01


def test_an_engine_is_forced_along_a_text_that_is_not_its_own():
    """Its token after each prefix of the text is that of a stepped backend after the same one."""
    source, stepped = (SteppedSide(SyntheticBackend(**SHAPE)) for _ in range(2))
    side = EngineSide(SmallEngine(**SMALL))
    prompt = list(range(40))
    own = alone(stepped.desk, [prompt], 8)
    other = [token if at % 3 else token ^ 1 for at, token in enumerate(own[0])]
    for text in (own[0], other):
        found = forced(source, side, [prompt], [text])
        wanted = measured(stepped.desk, [prompt], [text])
        assert [it.token for it in found[0]] == [it.token for it in wanted[0]]
        assert forced(side, stepped, [prompt], [text]) == wanted
    for each in (source, stepped, side):
        each.close()
