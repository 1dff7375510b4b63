"""vLLM in bfloat16 on either side of a handoff, beside torch in float32, along the same texts."""

from __future__ import annotations

from typing import Any

import pytest

from backends.api import Sampled
from backends.testing.alike import HALF
from tests.bench.matrix.pair import Texts, alone, distance, forced, measured
from tests.bench.matrix.sides import EngineSide, SteppedSide
from tests.support.prompts import prompts

TOKENS = 12
ASKED = [list(prompt) for prompt in prompts()[::4]]


@pytest.fixture(scope="module")
def truth(partners: Any) -> tuple[Texts, list[list[Sampled]]]:
    """What torch says alone in float32, and how likely everything else was."""
    side = SteppedSide(partners["torch"])
    texts = alone(side.desk, ASKED, TOKENS)
    found = measured(side.desk, ASKED, texts)
    side.close()
    return texts, found


@pytest.mark.parametrize("pair", ["torch vllm", "vllm torch", "vllm vllm"])
def test_a_pair_is_as_near_as_sixteen_bits_can_be(
    pair: str, truth: tuple[Texts, list[list[Sampled]]], partners: Any, vllm: Any
) -> None:
    sides = {
        "torch": SteppedSide(partners["torch in bfloat16"]),
        "vllm": EngineSide(vllm["h"]),
    }
    source, target = (sides[name] for name in pair.split())
    texts, measure = truth
    far = distance(forced(source, target, ASKED, texts), measure)
    assert 1e-6 < far.kl <= HALF.kl, far
    assert far.top1 >= HALF.top1, far
    sides["torch"].close()
