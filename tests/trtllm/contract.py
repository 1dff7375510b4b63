"""Reads `contract.toml`: which names a release has."""

import contextlib
import dataclasses
import importlib
import inspect
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONTRACT = tomllib.loads((Path(__file__).parent / "contract.toml").read_text())
RELEASES: list[str] = CONTRACT["releases"]
CONNECTOR_CLASSES = ("KvCacheConnectorWorker", "KvCacheConnectorScheduler")
SHORT = (*CONNECTOR_CLASSES, "RequestData", "SchedulerOutput")
"""Names without a module are the connector's."""


def names(entry: dict[str, Any], release: str) -> list[str] | None:
    """What a release has of an entry; None when it has not even that."""
    found: list[str] = []
    there = False
    for one in RELEASES[: RELEASES.index(release) + 1]:
        if one in entry:
            there = True
            found += entry[one]
    if not there:
        return None
    return found + entry.get("only", {}).get(release, [])


def modules(release: str) -> Iterator[tuple[str, list[str], bool]]:
    """Modules, what they have, and whether the release has them."""
    place = RELEASES.index(release)
    for entry in CONTRACT["module"]:
        first = RELEASES.index(entry.get("since", RELEASES[0]))
        last = RELEASES.index(entry.get("until", RELEASES[-1]))
        yield entry["name"], entry["has"], first <= place <= last


def found_in(module: str, names: list[str]) -> list[str]:
    """Those that are there, of what a module should have."""
    try:
        there = importlib.import_module(module)
    except ModuleNotFoundError:
        return []
    return [name for name in names if hasattr(there, name)]


def entries(kind: str, release: str) -> Iterator[tuple[str, list[str] | None]]:
    """The functions, records or objects, and their names in that release."""
    for entry in CONTRACT[kind]:
        yield entry["name"], names(entry, release)


def find(name: str, api: Any) -> Any:
    """What is called so; None when it is not there."""
    found, rest = api, name.split(".")
    if rest[0] not in SHORT:
        found = importlib.import_module(rest.pop(0))
    for part in rest:
        if inspect.ismodule(found) and not hasattr(found, part):
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part, None)
    return found


def parameters(function: Any) -> list[str]:
    return [it for it in inspect.signature(function).parameters if it != "self"]


def fields(record: Any) -> list[str]:
    """Of a dataclass or a pydantic model."""
    if dataclasses.is_dataclass(record):
        return [it.name for it in dataclasses.fields(record)]
    return list(record.model_fields)
