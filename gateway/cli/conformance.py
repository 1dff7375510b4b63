"""`baton conformance NAME`: whether a plug-in keeps the promises of its contract."""

from __future__ import annotations

import argparse
import tomllib
import traceback
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gateway.logs import configure
from gateway.settings import ConfigError, Problem

FAILED = 1
UNPROVEN = 3
"""Nothing is broken, but what is at the core of its contract could not be shown."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `baton conformance` takes."""
    parser.epilog = (
        "Exit status: 0 it keeps what is at the core and breaks nothing, 1 it breaks a promise, "
        "2 it could not be looked at, 3 it breaks none but its core could not be proven. "
        "With --only, what was not looked at does not count."
    )
    parser.add_argument("name", help="a plug-in's name, or module:Class before it is packaged")
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="FILE|KEY=VALUE",
        help="what [workers.X.options] would hold, in a file or as words; values as in TOML",
    )
    parser.add_argument(
        "--reference",
        nargs="+",
        default=[],
        metavar="NAME|KEY=VALUE",
        help="an engine for the same model, with its options; default: emulation in float32",
    )
    parser.add_argument(
        "--tiny-model",
        action="store_true",
        help="with a Llama of random weights, made for this, as its option `model`",
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="promises with this in their name, no others"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there")


def run_conformance(options: argparse.Namespace) -> int:
    """Look at every promise, print a table and what to fix; 0 when it keeps those at its core.

    Raises:
        ConfigError: there is no such plug-in, or it refuses its options.
    """
    configure("error")
    given = _read(options.options)
    with TemporaryDirectory(prefix="baton-tiny-") as folder:
        if options.tiny_model:
            from backends.testing.tiny import write_tiny_model

            given["model"] = str(write_tiny_model(Path(folder)))
        return _examine(options, given)


def _examine(options: argparse.Namespace, given: dict[str, Any]) -> int:
    from backends.errors import BackendMisconfigured, BackendNotFound
    from backends.testing import conformance, line, summary

    reference = None
    if options.reference:
        name, *rest = options.reference
        reference = name, _read(rest)
    try:
        report = conformance(
            options.name,
            given,
            reference=reference,
            only=options.only,
            tell=lambda verdict: print(line(verdict), flush=True),
        )
    except (BackendMisconfigured, BackendNotFound) as error:
        raise ConfigError(Problem(options.name, "", str(error))) from error
    except Exception as error:  # foreign code, which its author must be able to find
        traceback.print_exception(error)
        raise ConfigError(Problem(options.name, "", f"it cannot be made: {error}")) from error
    print(summary(report))
    if options.json is not None:
        options.json.write_bytes(report.json())
    if not report.ok:
        return FAILED
    return 0 if report.proven else UNPROVEN


def _read(words: Iterable[str]) -> dict[str, Any]:
    """Options from TOML files and `key=value` words, the later ones over the earlier."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if equals:
            found[key] = _value(value)
            continue
        try:
            found.update(tomllib.loads(Path(word).read_text()))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(Problem(word, "", str(error))) from error
    return found


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
