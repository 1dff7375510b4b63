"""Two workers whose weights have unlike precision: only where their operator says so."""

from __future__ import annotations

import pytest

from backends.api import Sampling
from backends.host import HostConfig
from backends.testing.form import Broken
from backends.testing.site import hand_over, meet, site

GREEDY = Sampling(temperature=0.0, ignore_eos=True)


async def test_unlike_weights_meet_only_where_that_is_set(onnx, four_bits):
    exact = onnx(four_bits, weights="float32", block_tokens=32).backend
    packed = onnx(four_bits, weights="q4").backend
    async with site() as here:
        first = await here.start("prefill", exact)
        second = await here.start("decode", packed)
        with pytest.raises(Broken, match="weights"):
            await meet(first, second)
    async with site() as here:
        first = await here.start("prefill", exact, unlike_weights=True)
        second = await here.start("decode", packed, unlike_weights=True)
        transport = await meet(first, second)
        texts = []
        for _ in range(2):  # the second time nothing is kept of the first
            spec = here.spec(list(range(3, 60)), GREEDY, 8)
            said = await hand_over(first, second, spec, transport)
            texts.append([it.token for it in said[0]])
            await first.balanced()
            await second.balanced()
    assert texts[0] == texts[1]


def test_what_unlike_engines_computed_is_kept_only_where_that_is_asked_for():
    given = {"id": "d", "role": "decode", "listen": "unix:/nowhere"}
    assert HostConfig(**given).keeping == "auto"
    assert HostConfig(**given, unlike_weights=True).keeping == "off"
    assert HostConfig(**given, unlike_weights=True, reuse="on").keeping == "on"
