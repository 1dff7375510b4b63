"""A worker of any kind, killed while KV is on its way to or from it, and while it decodes."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.e2e.site import Site, serve, worker
from tests.e2e.streams import Stream, run_all
from tests.emulation.desk import bundled_model

SLOWLY = "delay@*:0.3"
"""What a prefill worker's faults are, so that there is time to kill somebody during a handoff."""

ROOT = Path(__file__).parents[2]
PROMPTS = (
    "The capital of France is",
    "Once upon a time, there",
    "Water boils at",
    "def add(a, b):",
)


def real(backend: str, **options: Any) -> dict[str, Any]:
    """The bundled model in an engine of ours."""
    return {
        "backend": backend,
        "options": {"model": bundled_model(), "pool_tokens": 2048, **options},
        "threads": 1,
    }


TORCH = real("emulation", dtype="float32")


def announced(folder: Path, name: str, target: str) -> Path:
    """A folder that has the plug-in `name` as if a wheel of it had been installed there."""
    about = folder / f"{name}-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[baton.backends]\n{name} = {target}\n")
    return folder


@contextlib.contextmanager
def pair(
    folder: Path, prefill: dict[str, Any], decode: dict[str, Any], *paths: Path
) -> Iterator[Site]:
    """`baton serve` with these two kinds of workers; handoffs take their time."""
    tree = {
        "workers": {
            "prefill": worker("prefill", faults=SLOWLY, **prefill),
            "decode": worker("decode", **decode),
        },
        "gateway": {"request_timeout_seconds": 300},
        "queue": {"lease_seconds": 3},
    }
    with serve(folder, tree, 300, (*paths, ROOT)) as site:
        yield site


class Killer:
    """Kills parts of `site` under the same streams; knows what they say undisturbed.

    There is a stream for each of the prompts, of `n` sequences of so many `tokens`.
    """

    def __init__(
        self, site: Site, tokens: int = 40, *, prompts: tuple[str, ...] = PROMPTS, n: int = 2
    ) -> None:
        self.site = site
        self._tokens, self._prompts, self._n = tokens, prompts, n
        undisturbed = self._streams()
        run_all(undisturbed)
        assert all(stream.whole for stream in undisturbed), [it.error for it in undisturbed]
        self._expected = [stream.text for stream in undisturbed]

    def _streams(self) -> list[Stream]:
        return [
            Stream(self.site, prompt, self._tokens, n=self._n, temperature=0, ignore_eos=True)
            for prompt in self._prompts
        ]

    def during_a_handoff(self, part: str) -> None:
        """Kill `part` when a client has its first token and KV is still on its way."""
        self._kill(part, lambda _: self._landings())

    def while_decoding(self, part: str) -> None:
        """Kill `part` when each stream has tokens that were decoded, and none is over."""
        self._kill(part, lambda streams: all(it.tokens > self._n for it in streams))

    def _landings(self) -> bool:
        _, book = self.site.request("/debug/ledger")
        held = [holder["reason"] for one in book["workers"] for holder in one["holders"]]
        return "landing" in held

    def _kill(self, part: str, moment: Callable[[list[Stream]], bool]) -> None:
        site, streams = self.site, self._streams()
        old = site.parts[part].pid

        def strike() -> None:
            site.until(lambda: moment(streams))
            assert not any(stream.finish for stream in streams), "too late: one is over"
            site.kill(part)

        run_all(streams, strike)
        for stream, expected in zip(streams, self._expected, strict=True):
            assert stream.whole or stream.typed, vars(stream)
            assert not stream.whole or stream.text == expected
        assert all(stream.whole for stream in streams), [it.error for it in streams]
        site.until(lambda: part in site.parts and site.parts[part].pid != old)
        site.until(site.ready)
        again = self._streams()[0].run()
        assert again.text == self._expected[0], vars(again)
        site.until(site.balanced)
