"""SIGKILL of the engine's processes while a prompt is read, and while its KV is on its way."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.site import DECODE, SYNTHETIC, Site, serve, worker
from tests.e2e.test_processes_die import Stream
from tests.trtllm.handing import SYNTHETIC as KNOWN
from tests.trtllm.play import STANDIN, Gates, until, write_model

pytestmark = pytest.mark.skipif(
    "BATON_KILL_ENGINES" not in os.environ, reason="`make test-trtllm` does, in a few minutes"
)

PROMPT = "Tell me a story of a very long journey, " * 12


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Gates:
    return Gates(tmp_path_factory.mktemp("gates"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, gates: Gates) -> Iterator[Site]:
    """A prefill worker on the stand-in, whose two ranks are processes, and a synthetic decoder."""
    folder = tmp_path_factory.mktemp("site")
    shape = {"layers": 4, "kv_heads": 2, "head_dim": 32}
    options = {
        "model": str(write_model(folder / "model", **shape)),
        "tensor_parallel": 2,
        "chunk_tokens": 64,
        "pool_tokens": 8192,
        "kv_cache": {"max_tokens": 8192},
        **KNOWN,
    }
    workers = {
        "prefill": worker("prefill", "standin", options),
        "decode": worker("decode", "synthetic", {**SYNTHETIC, **shape, **DECODE}),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "PYTHONPATH", os.pathsep.join([str(STANDIN), os.environ.get("PYTHONPATH", "")])
        )
        patch.setenv("TLLM_STANDIN", "1.3")
        patch.setenv("TLLM_STANDIN_KNOBS", f'{{"gates": "{gates}"}}')
        tree = {"workers": workers, "queue": {"lease_seconds": 3}}
        with serve(folder, {**tree, "gateway": {"request_timeout_seconds": 60}}) as running:
            try:
                yield running
            finally:
                for gate in Path(str(gates)).glob("*"):
                    gate.unlink(missing_ok=True)


def ranks(site: Site) -> list[psutil.Process]:
    """The engine's processes: those of the worker's that compute."""
    found = site.parts["prefill"].children(recursive=True)
    return [it for it in found if it.num_threads() > 2]


@pytest.mark.parametrize("gate", ["after_chunk", "pinned"])
@pytest.mark.parametrize("victim", ["worker", "rank"])
def test_a_killed_engine_costs_time_and_no_answer(
    site: Site, gates: Gates, gate: str, victim: str
) -> None:
    prompt = f"{victim} at {gate}: {PROMPT}"  # not yet in the engine's memory
    running = Stream(site, prompt, 16)
    thread = threading.Thread(target=running.run)
    gates.shut(gate)
    try:
        thread.start()
        until(lambda: gates.reached(gate), 30)
        old = ranks(site)
        assert len(old) >= 2
        if victim == "rank":
            old[-1].send_signal(signal.SIGKILL)
        else:
            site.kill("prefill")
    finally:
        gates.open(gate)
        thread.join(60)
    assert running.whole, vars(running)
    _, alive = psutil.wait_procs(old, 10)
    assert not alive
    site.until(lambda: "prefill" in site.parts and site.ready())
    assert site.complete(prompt, seed=5)["choices"][0]["text"] == running.text[0]
    site.until(site.balanced)
