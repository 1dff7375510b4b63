"""SIGKILL of a worker of each kind that computes the real model, with another kind beside it.

In float32, so that the text does not depend on who goes on with it, or on where it began again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.e2e.killing import PROMPTS, ROOT, TORCH, Killer, announced, pair, real
from tests.e2e.site import PREFILL
from tests.llamacpp.conftest import ABSENT, FULL, installed

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not installed("llama_cpp"), reason=ABSENT)]

KINDS = {
    "torch": TORCH,
    "llamacpp": real("llamacpp", **FULL),
    "onnxruntime": real("onnxruntime", weights="float32"),
    "abacus": real("abacus"),
}
PAIRS = list(itertools.pairwise(["torch", "llamacpp", "onnxruntime", "abacus", "torch"]))


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def killer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Killer]:
    """A prefill worker of the one kind for a decode worker of the other."""
    prefill, decode = (KINDS[name] for name in request.param)
    if request.param[0] == "torch":
        prefill = {**prefill, "options": {**prefill["options"], **PREFILL}}
    third_party = announced(
        tmp_path_factory.mktemp("abacus"), "abacus", "abacus_decode:AbacusBackend"
    )
    paths = third_party, ROOT / "tests" / "third_party"
    with pair(tmp_path_factory.mktemp("site"), prefill, decode, *paths) as site:
        if "abacus" in request.param:
            # It takes its time: few tokens where it decodes, and where it prefills so many that
            # the first prompt's are not all there before the second one's begin.
            tokens = 12 if request.param[1] == "abacus" else 40
            yield Killer(site, tokens=tokens, prompts=PROMPTS[:2], n=1)
        else:
            yield Killer(site)


@pytest.mark.parametrize("part", ["prefill", "decode"])
def test_a_worker_dies_during_a_handoff(killer: Killer, part: str) -> None:
    killer.during_a_handoff(part)


def test_a_worker_dies_while_it_decodes(killer: Killer) -> None:
    killer.while_decoding("decode")
