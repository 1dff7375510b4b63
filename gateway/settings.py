"""Read the configuration from a file, the environment and flags, and name every mistake in it.

Flags win over `BATON__SECTION__KEY=...`, that over the file, that over the defaults. A mistake is
reported with its dotted path and where it came from, all mistakes at once. Start with `load`.
"""

from __future__ import annotations

import ipaddress
import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import msgspec

from backends.protocol import split_address
from gateway.config import Config, Section, WorkerSection, default_workers
from gateway.redis_url import sentinels_of

ENV_PREFIX = "BATON__"
Tree = dict[str, Any]


class Problem(msgspec.Struct, frozen=True):
    """One mistake: the setting's dotted path, where its value came from, what is wrong."""

    path: str
    origin: str
    message: str

    def __str__(self) -> str:
        origin = f" ({self.origin})" if self.origin else ""
        return f"{self.path}{origin}: {self.message}" if self.path else self.message


class ConfigError(Exception):
    """The configuration cannot be used. The operator's fault; lists every problem."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


def load(
    path: Path | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
    with_workers: bool = True,
) -> Config:
    """The configuration that file, environment and flags (by dotted path) make together.

    `with_workers` adds the default workers to a file that names none.

    Raises:
        ConfigError: with every problem found.
    """
    origins: dict[str, str] = {}
    tree = _read_file(path, origins) if path else {}
    if with_workers and "workers" not in tree:
        tree["workers"] = {name: dict(worker) for name, worker in default_workers().items()}
    problems: list[Problem] = []
    for key, raw in sorted((os.environ if environ is None else environ).items()):
        if key.startswith(ENV_PREFIX):
            dotted = key.removeprefix(ENV_PREFIX).lower().split("__")
            value = _from_text(raw, _type_at(Config, dotted))
            _put(tree, dotted, value, key, origins, problems)
    for dotted_path, value in (flags or {}).items():
        flag = f"--{dotted_path.rsplit('.', 1)[-1].replace('_', '-')}"
        _put(tree, dotted_path.split("."), value, flag, origins, problems)
    config: Config = _build(Config, tree, "", origins, problems)
    if problems:
        raise ConfigError(*problems)
    problems.extend(_contradictions(config, origins))
    if problems:
        raise ConfigError(*problems)
    return msgspec.structs.replace(config, data_dir=str(_data_dir(config.data_dir)))


def api_keys(config: Config) -> dict[str, str]:
    """The tenant of each key: what `gateway.api_keys` and `gateway.api_keys_file` say together.

    Raises:
        ConfigError: the file cannot be read, or a line is not a key.
    """
    lines = list(config.gateway.api_keys)
    if config.gateway.api_keys_file:
        try:
            text = Path(config.gateway.api_keys_file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(Problem("gateway.api_keys_file", "", str(error))) from error
        lines += [line.split("#", 1)[0] for line in text.splitlines()]
    keys: dict[str, str] = {}
    for line in filter(None, map(str.strip, lines)):
        tenant, colon, key = line.partition(":")
        if not colon:
            tenant, key = "default", line
        if not (tenant and key.strip()):
            message = "a key is written KEY or TENANT:KEY; one of them is empty"
            raise ConfigError(Problem("gateway.api_keys", "", message))
        keys[key.strip()] = tenant
    return keys


def is_loopback(host: str) -> bool:
    """Whether nobody outside this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_wildcard(host: str) -> bool:
    """Whether `host` means every address of this machine, and so leads nobody to it."""
    return host.strip("[]") in ("0.0.0.0", "::")  # noqa: S104 - recognised, not listened on


def _read_file(path: Path, origins: dict[str, str]) -> Tree:
    try:
        text = path.read_text(encoding="utf-8")
        tree: Any = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:  # a decoding error of either format is a ValueError
        raise ConfigError(Problem("", "", f"{path}: {error}")) from error
    if not isinstance(tree, dict):
        raise ConfigError(Problem("", "", f"{path}: expected a table"))
    for dotted in _leaves(tree):
        origins[dotted] = str(path)
    return tree


def _leaves(tree: Tree, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")


def _put(
    tree: Tree,
    dotted: list[str],
    value: Any,
    origin: str,
    origins: dict[str, str],
    problems: list[Problem],
) -> None:
    """Set `value` at `dotted`, making tables on the way."""
    *parents, name = dotted
    for index, parent in enumerate(parents):
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            where = ".".join(dotted[: index + 1])
            problems.append(Problem(".".join(dotted), origin, f"{where} is not a table"))
            return
        tree = child
    tree[name] = value
    origins[".".join(dotted)] = origin


def _type_at(section: type, dotted: list[str]) -> Any:
    """The declared type of the setting at `dotted`; Any below free-form tables and unknowns."""
    current: Any = section
    for part in dotted:
        if isinstance(current, type) and issubclass(current, Section):
            current = get_type_hints(current).get(part, Any)
        elif current == dict[str, WorkerSection]:
            current = WorkerSection
        else:
            return Any
    return current


def _origin(path: str, origins: Mapping[str, str]) -> str:
    """Where the value at `path`, or the first one below it, was written."""
    below = (key for key in origins if key == path or key.startswith(f"{path}."))
    return next((origins[key] for key in below), "")


def _from_text(raw: str, declared: Any) -> Any:
    """An environment variable's value: text where text is declared, else read as TOML."""
    if declared is str:
        return raw
    if get_origin(declared) is tuple and not raw.lstrip().startswith("["):
        item = get_args(declared)[0]
        return [_from_text(part.strip(), item) for part in raw.split(",") if part.strip()]
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return raw


def _build(
    section: type[Any], tree: Any, path: str, origins: dict[str, str], problems: list[Problem]
) -> Any:
    """A struct of `section`'s type; problems go to the list, and then the result is of no use."""
    if not isinstance(tree, dict):
        problems.append(Problem(path, _origin(path, origins), "expected a table"))
        return None
    fields = {field.name: field for field in msgspec.structs.fields(section)}
    values: Tree = {}
    for name, raw in tree.items():
        where = f"{path}.{name}" if path else name
        origin = _origin(where, origins)
        if name not in fields:
            known = ", ".join(sorted(fields))
            problems.append(Problem(where, origin, f"there is no such setting; known: {known}"))
            continue
        declared = fields[name].type
        if declared == dict[str, WorkerSection]:
            values[name] = _build_workers(raw, where, origins, problems)
        elif isinstance(declared, type) and issubclass(declared, Section):
            values[name] = _build(declared, raw, where, origins, problems)
        else:
            try:
                values[name] = msgspec.convert(raw, declared)
            except msgspec.ValidationError as error:
                problems.append(Problem(where, origin, str(error).replace(" - at `$", " - at `")))
    for name, field in fields.items():
        if field.required and name not in tree:
            where = f"{path}.{name}" if path else name
            problems.append(Problem(where, _origin(path, origins), "is required"))
    return None if problems else section(**values)


def _build_workers(
    tree: Any, path: str, origins: dict[str, str], problems: list[Problem]
) -> dict[str, WorkerSection]:
    if not isinstance(tree, dict):
        problems.append(Problem(path, _origin(path, origins), "expected a table of workers"))
        return {}
    for name in tree:
        if not (name.replace("-", "").replace("_", "").isalnum() and name.isascii()):
            message = "a worker's name consists of letters, digits, - and _"
            problems.append(Problem(f"{path}.{name}", _origin(f"{path}.{name}", origins), message))
    return {
        name: _build(WorkerSection, worker, f"{path}.{name}", origins, problems)
        for name, worker in tree.items()
    }


TLS_FILES = ("tls_certificate", "tls_key", "tls_authority")


def _contradictions(config: Config, origins: dict[str, str]) -> Iterator[Problem]:
    """What no single field can know."""

    def problem(path: str, message: str) -> Problem:
        return Problem(path, _origin(path, origins), message)

    try:
        api_keys(config)
    except ConfigError as error:
        yield from error.problems
    if config.redis.url:
        try:
            sentinels_of(config.redis.url)
        except ValueError as error:
            yield problem("redis.url", str(error))
    files = {name: getattr(config.security, name) for name in TLS_FILES}
    if any(files.values()):
        for name, file in files.items():
            if not file:
                yield problem(f"security.{name}", "must be set, as the other files for TLS are")
    for name, worker in config.workers.items():
        yield from _worker_contradictions(f"workers.{name}", worker, config, problem)


def _worker_contradictions(
    path: str, worker: WorkerSection, config: Config, problem: Any
) -> Iterator[Problem]:
    hosts = {"data_host": worker.data_host}
    if worker.listen:
        try:
            kind, host, _ = split_address(worker.listen)
        except ValueError as error:
            yield problem(f"{path}.listen", str(error))
        else:
            if kind == "tcp":
                hosts["listen"] = host
                if is_wildcard(host) and is_loopback(worker.data_host):
                    yield problem(
                        f"{path}.data_host",
                        f"must be the address under which others reach this machine, since"
                        f" {path}.listen is every address of it",
                    )
            elif len(worker.listen) - len("unix:") > 100:
                yield problem(f"{path}.listen", "a Unix socket's path has at most 100 characters")
    for field, host in hosts.items():
        if not (is_loopback(host) or config.security.secret):
            yield problem(
                f"{path}.{field}",
                f"{host} is reachable from outside, so security.secret must be set",
            )
    absent = set(worker.cpus) - os.sched_getaffinity(0)
    if absent:
        yield problem(f"{path}.cpus", f"CPU {min(absent)} is not there or not ours")


def _data_dir(configured: str) -> Path:
    if configured:
        return Path(configured).expanduser().absolute()
    home = os.environ.get("XDG_DATA_HOME", "")
    return (Path(home) if home.startswith("/") else Path.home() / ".local" / "share") / "baton"
