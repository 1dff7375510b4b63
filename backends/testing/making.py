"""Make a plug-in by its name, as a worker does, and as often as it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint
from typing import Any

import msgspec

from backends.errors import BackendNotFound
from backends.host.plugins import GROUP, construct, find_backend


class Maker(msgspec.Struct, frozen=True):
    """Constructs the backend `name` with `options`; `factory` is what its entry point loads."""

    name: str
    factory: Callable[..., Any]
    options: dict[str, Any] = {}

    @classmethod
    def of(cls, name: str, options: Mapping[str, Any]) -> Maker:
        """Of an entry point's name, or of `module:Class` for one that is not packaged yet.

        Raises:
            BackendNotFound: there is no such entry point, module or class.
        """
        if ":" not in name:
            return cls(name, find_backend(name).load(), dict(options))
        try:
            factory = EntryPoint(name, name, GROUP).load()
        except (AttributeError, ModuleNotFoundError) as error:
            module = name.partition(":")[0]
            if isinstance(error, ModuleNotFoundError) and not module.startswith(str(error.name)):
                raise  # what the module itself imports
            raise BackendNotFound(f"there is no {name}: {error}") from error
        return cls(name, factory, dict(options))

    def make(self, **changes: Any) -> Any:
        """One more of them, with some options changed.

        Raises:
            BackendMisconfigured: it refuses them, or does not have the members of a contract.
        """
        return construct(self.name, self.factory, {**self.options, **changes})

    def takes(self, option: str) -> bool:
        """Whether it has such an option."""
        return option in inspect.signature(self.factory).parameters

    @property
    def line(self) -> str:
        """Name and options in one line."""
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])
