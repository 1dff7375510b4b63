"""Find the plug-in that was named, and only that one."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from backends.api import Backend, BackendInfo, BackendMisconfigured, BackendNotFound
from backends.host.pools import pools_of
from backends.protocol import Role
from transfer.pool import Pool

GROUP = "baton.backends"
PROGRESS = "progress"
"""The argument by which a plug-in is given whom to tell how far it has loaded; no option."""

MEMBERS = {
    "stepped": ("info", "pool", "step", "ingest", "copy_blocks", "close"),
    "engine": ("info", "pool", "start", "prefill", "decode", "abort", "pins", "close"),
}


def find_backend(name: str) -> EntryPoint:
    """The entry point called `name`.

    Raises:
        BackendNotFound: there is none; lists those there are.
    """
    installed = {point.name: point for point in entry_points(group=GROUP)}
    if name not in installed:
        raise BackendNotFound(
            f"no backend is called {name!r}; installed: {', '.join(sorted(installed)) or 'none'}"
        )
    return installed[name]


def load_backend(
    name: str,
    options: Mapping[str, Any],
    progress: Callable[[str, float], None] | None = None,
    *,
    role: Role | None = None,
) -> Backend:
    """Import the plug-in and construct it. Its own import error comes out unchanged.

    `progress(phase, fraction)` is passed on where the plug-in takes an argument of that name.

    Raises:
        BackendNotFound: no such entry point.
        BackendMisconfigured: it refuses an option, lacks a member of its contract, or cannot do
            what a worker in that `role` must.
    """
    backend = construct(name, find_backend(name).load(), options, progress)
    _assert_phases(name, backend.info, role)
    return backend


def construct(
    name: str,
    factory: Callable[..., Any],
    options: Mapping[str, Any],
    progress: Callable[[str, float], None] | None = None,
) -> Backend:
    """Call the factory of the plug-in `name`; as `load_backend`, whose second half this is."""
    refuse_unknown(name, factory, options)
    arguments = dict(options)
    parameters = inspect.signature(factory).parameters
    if progress is not None and (_takes_any(parameters) or PROGRESS in parameters):
        arguments[PROGRESS] = progress
    elif PROGRESS in parameters and _is_required(parameters[PROGRESS]):
        arguments[PROGRESS] = _nobody_waits
    lacking = [it for it in parameters if _is_required(parameters[it]) and it not in arguments]
    if lacking:
        raise BackendMisconfigured(f"backend {name!r} needs the option {lacking[0]!r}")
    backend: Backend = factory(**arguments)
    kind = getattr(getattr(backend, "info", None), "kind", "stepped")
    missing = [member for member in MEMBERS[kind] if not hasattr(backend, member)]
    if missing:
        raise BackendMisconfigured(f"backend {name!r} lacks {', '.join(missing)}")
    assert_pool_fits(name, backend)
    return backend


def refuse_unknown(name: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Look at the names of an operator's options alone.

    Raises:
        BackendMisconfigured: the plug-in `name` has none of that name; says which is meant.
    """
    parameters = inspect.signature(factory).parameters
    known = [it for it in parameters if it != PROGRESS]
    takes_any = _takes_any(parameters)
    unknown = [it for it in options if it == PROGRESS or not (takes_any or it in known)]
    if not unknown:
        return
    close = difflib.get_close_matches(unknown[0], known, 1)
    meant = f" (did you mean {close[0]!r}?)" if close else ""
    raise BackendMisconfigured(
        f"backend {name!r} has no option {unknown[0]!r}{meant}; it has: {', '.join(known)}"
    )


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(it.kind is it.VAR_KEYWORD for it in parameters.values())


def _nobody_waits(_phase: str, _fraction: float) -> None:
    """For whom no progress is shown."""


def requires(name: str, option: str) -> bool:
    """Whether the backend `name` must be given that option.

    Raises:
        BackendNotFound: no such entry point.
    """
    parameter = inspect.signature(find_backend(name).load()).parameters.get(option)
    return parameter is not None and _is_required(parameter)


def _is_required(parameter: inspect.Parameter) -> bool:
    variable = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    return parameter.default is parameter.empty and not variable


def assert_pool_fits(name: str, backend: Backend) -> None:
    """Refuse a pool whose size is not what the stated layout takes."""
    info = backend.info
    try:
        for pool in pools_of(info, backend.pool):
            Pool.of(pool.layout, info.pool_blocks, pool.memory)
    except (TypeError, ValueError) as error:
        raise BackendMisconfigured(f"backend {name!r}: {error}") from error


def _assert_phases(name: str, info: BackendInfo, role: Role | None) -> None:
    """Refuse a role of which the backend cannot do a part; None asks for none."""
    wanted = ("prefill", "decode") if role == "both" else (role,)
    lacking = [it for it in wanted if it is not None and it not in info.phases]
    if lacking:
        raise BackendMisconfigured(
            f"backend {name!r} does not {lacking[0]}: it cannot have role {role!r}"
        )
