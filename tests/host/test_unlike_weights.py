"""KV that other weights computed reaches a worker only where its operator allows it as well."""

from typing import Any

import msgspec
import pytest

from backends.api import Sampling
from backends.emulation.synthetic import SyntheticBackend
from backends.testing.form import Broken
from backends.testing.site import hand_over, meet, site
from tests.host.test_control import SHAPE

GREEDY = Sampling(temperature=0.0, ignore_eos=True)
REFUSED = "weights: the source has 'float32', the target 'q4'"


def backend(weights: str) -> Any:
    """Of the same checkpoint, and says that its copy of it is of such weights."""
    made = SyntheticBackend(**SHAPE)
    layout = msgspec.structs.replace(made.info.layout, weights=weights)
    made.info = msgspec.structs.replace(made.info, layout=layout)
    return made


@pytest.mark.parametrize(("sender", "receiver"), [(True, False), (False, True), (False, False)])
async def test_a_pair_of_unlike_weights_does_not_meet_unless_both_ends_allow_it(
    sender: bool, receiver: bool
) -> None:
    async with site() as here:
        prefill = await here.start("prefill", backend("float32"), unlike_weights=sender)
        decode = await here.start("decode", backend("q4"), unlike_weights=receiver)
        with pytest.raises(Broken, match=REFUSED):
            await meet(prefill, decode)


async def test_a_pair_that_may_meet_hands_over() -> None:
    async with site() as here:
        prefill = await here.start("prefill", backend("float32"), unlike_weights=True)
        decode = await here.start("decode", backend("q4"), unlike_weights=True)
        transport = await meet(prefill, decode)
        lines = await hand_over(prefill, decode, here.spec([1] * 40, GREEDY, 4), transport)
        assert len(lines[0]) == 4
