"""An engine at a desk, whichever of the two contracts it fulfils.

As source it computes a prefix and carries it over; as target it is forced along a text. A stepped
backend is forced token by token. An engine chooses its own tokens: it goes on for as long as they
are those of the text, and where one is not, it is given the KV of the text up to there anew.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any, Protocol

from backends.api import BackendInfo, Sampled, Sampling
from backends.testing.alike import MOST_ALTERNATIVES
from backends.testing.carrying import carry
from backends.testing.desk import Desk, Line
from backends.testing.engine.desk import EngineDesk
from tests.support.kept import KeptEngine

TELLING = Sampling(temperature=0.0, ignore_eos=True, logprobs=MOST_ALTERNATIVES)

Bring = Callable[[list[int], Items[int]], None]
"""Has the KV of these tokens computed elsewhere, and carried into these blocks."""


class Side(Protocol):
    """One engine. `backend` may be lent to a worker in between."""

    backend: Any

    @property
    def info(self) -> BackendInfo:
        """What it says of itself."""

    def give(self, tokens: list[int], target: Side, blocks: Items[int]) -> None:
        """Compute the KV of `tokens`, and carry it into these blocks of another one's pool."""

    def along(self, prompt: list[int], text: list[int], bring: Bring) -> list[Sampled]:
        """What it gives after each token of `text`, from a prompt whose KV is brought."""

    def close(self) -> None:
        """Give everything back."""


class SteppedSide:
    """One that the desk steps."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.info = backend, backend.info
        self.desk = Desk(backend)

    def give(self, tokens: list[int], target: Side, blocks: Items[int]) -> None:
        """See `Side`."""
        line = Line(tokens)
        self.desk.prefill(line)
        carry(self.backend, line.blocks, target.backend, blocks, len(tokens))
        self.desk.release(line)

    def along(self, prompt: list[int], text: list[int], bring: Bring) -> list[Sampled]:
        """See `Side`."""
        line = Line(prompt, TELLING)
        line.generated.append(text[0])
        self.desk.cover(line, len(prompt))
        bring(prompt, line.blocks)
        self.desk.ingest(line.blocks)
        self.desk.force(line, text)
        self.desk.release(line)
        return line.sampled

    def close(self) -> None:
        """See `Side`."""
        self.desk.close()


class EngineSide:
    """One that schedules by itself."""

    def __init__(self, backend: Any) -> None:
        kept = isinstance(backend, KeptEngine)
        self.backend: KeptEngine = backend if kept else KeptEngine(backend)
        self.info = backend.info
        self._desk = EngineDesk(self.backend)

    def give(self, tokens: list[int], target: Side, blocks: Items[int]) -> None:
        """See `Side`."""
        desk = self._begun()
        asked = desk.done(desk.prefill(tokens, seeds=()))
        carry(self.backend, asked.blocks, target.backend, blocks, len(tokens))
        desk.free.extend(asked.blocks)

    def along(self, prompt: list[int], text: list[int], bring: Bring) -> list[Sampled]:
        """See `Side`."""
        found: list[Sampled] = []
        while len(found) < len(text):
            desk, known = self._begun(), text[: len(found) + 1]
            left = len(text) - len(found)
            computed = [*prompt, *known[:-1]]
            blocks = desk.take(len(computed))
            bring(computed, blocks)
            asked = desk.decode(prompt, known, TELLING, blocks=blocks, tokens=left)
            said = desk.told(asked, left)
            desk.free.extend(blocks)
            wanted = text[len(known) :]
            right = zip(said, wanted, strict=False)
            same = next((at for at, (it, token) in enumerate(right) if it.token != token), left)
            found += said[: same + 1]
            desk.ear.forget()
        return found

    def close(self) -> None:
        """See `Side`."""
        self.backend.end()

    def _begun(self) -> EngineDesk:
        """The desk, which the engine answers to from now on."""
        self.backend.start(self._desk.ear)
        return self._desk


def side_of(backend: Any) -> Side:
    """A backend, at the desk of its contract."""
    return EngineSide(backend) if backend.info.kind == "engine" else SteppedSide(backend)
