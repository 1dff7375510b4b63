"""Which configured workers will be able to hand KV over, told before anything is started."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import msgspec

from backends.errors import BackendMisconfigured
from backends.foreseen import Foreseen, Untold, compare, foresee
from gateway.cli.model import find_model
from gateway.config import Config, WorkerSection
from gateway.settings import ConfigError, Problem
from transfer.errors import LayoutMismatch

Verdict = Literal["fits", "refused", "open"]


class Pair(msgspec.Struct, frozen=True):
    """A prefill and a decode worker: whether they fit, and how or why not, in words."""

    prefill: str
    decode: str
    verdict: Verdict
    detail: str

    @property
    def line(self) -> str:
        """For people."""
        word = {"fits": "", "refused": "cannot hand over: ", "open": ""}[self.verdict]
        return f"{self.prefill} -> {self.decode}: {word}{self.detail}"


def pairs(config: Config) -> list[Pair]:
    """All pairs of two workers that the configuration names.

    Raises:
        ConfigError: what a worker will have cannot be, whomever it meets.
    """
    foreseen = {name: _foresee(config, name, one) for name, one in config.workers.items()}
    return [
        _pair(prefill, decode, foreseen, unlike=one.unlike_weights and other.unlike_weights)
        for prefill, one in config.workers.items()
        for decode, other in config.workers.items()
        if prefill != decode and one.role != "decode" and other.role != "prefill"
    ]


def alone(config: Config, found: list[Pair]) -> Iterator[Problem]:
    """Workers that would never be used: none of those that they could meet fits."""
    for name, worker in config.workers.items():
        own = [it for it in found if name in (it.prefill, it.decode)]
        if worker.role != "both" and own and all(it.verdict == "refused" for it in own):
            yield Problem(f"workers.{name}", "", "; ".join(it.line for it in own))


def _foresee(config: Config, name: str, worker: WorkerSection) -> Foreseen | Untold:
    try:
        model = str(find_model(config.model.source))
        return foresee(worker.backend, worker.options, model)
    except Untold as why:
        return why
    except ValueError as error:
        raise ConfigError(Problem("model.source", "", str(error))) from error
    except BackendMisconfigured as error:
        raise ConfigError(Problem(f"workers.{name}.options", "", str(error))) from error


def _pair(
    prefill: str, decode: str, foreseen: Mapping[str, Foreseen | Untold], *, unlike: bool
) -> Pair:
    source, target = foreseen[prefill], foreseen[decode]
    try:
        if isinstance(source, Untold):
            raise source
        if isinstance(target, Untold):
            raise target
        return Pair(prefill, decode, "fits", compare(source, target, allow_unlike_weights=unlike))
    except LayoutMismatch as error:
        return Pair(prefill, decode, "refused", str(error))
    except Untold as why:
        return Pair(prefill, decode, "open", f"compared when they meet ({why})")
