"""The command line: `baton serve | gateway | worker | keys | check | settings | layout | export`.

Exit codes: 0 when it was told to stop, 1 when something failed, 2 when the configuration is
wrong. This is the only place that knows both the gateway and the worker host.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gateway.admission import RedisUnsuitable
from gateway.cli.conformance import add_arguments as add_conformance_arguments
from gateway.cli.keys import add_arguments as add_key_arguments
from gateway.cli.roofline import add_arguments as add_roofline_arguments
from gateway.config import Config
from gateway.logs import configure
from gateway.redis_server import DataDirInUse, RedisNotFound
from gateway.settings import ConfigError, Problem, load

BAD_CONFIG = 2
MOST_TOKENS = 1 << 24


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    from gateway.cli.status import Reporter

    options = _parser().parse_args(arguments)
    if options.command == "settings":
        from gateway.cli.table import settings_table

        print(settings_table())
        return 0
    reporter = Reporter()
    try:
        if options.command == "layout":
            return _explain(options)
        if options.command == "export":
            return _export(options)
        if options.command == "conformance":
            from gateway.cli.conformance import run_conformance

            return run_conformance(options)
        if options.command == "roofline":
            from gateway.cli.roofline import predict

            print("\n".join(predict(options)))
            return 0
        config = _load(options)
        configure(config.log.level, config.log.format)
        return _run(options, config, reporter)
    except ConfigError as error:
        reporter.failed(str(error))
        print(f"baton: the configuration is wrong\n{error}", file=sys.stderr)
        return BAD_CONFIG
    except (DataDirInUse, RedisNotFound, PermissionError) as error:
        reporter.failed(str(error))
        print(f"baton: {error}", file=sys.stderr)
        return BAD_CONFIG
    except ExceptionGroup as group:
        known, others = group.split((RedisUnsuitable, ConfigError))
        if known is None or others is not None:
            raise
        reporter.failed(_first(known))
        print(f"baton: {_first(known)}", file=sys.stderr)
        return BAD_CONFIG
    except KeyboardInterrupt:
        return 130


def _first(group: BaseException) -> str:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return str(group)


def _run(options: argparse.Namespace, config: Config, reporter: Any) -> int:
    match options.command:
        case "serve":
            return _serve(config)
        case "check":
            return _check(config)
        case "keys":
            from gateway.cli.keys import run_keys

            return run_keys(options, config)
        case "gateway":
            from gateway.cli.check import port_problem
            from gateway.cli.front import run_gateway

            taken = port_problem(config.gateway.host, config.gateway.port)
            if taken:
                raise ConfigError(Problem("gateway.port", "", taken))
            run_gateway(_with_redis(config), reporter)
        case "worker":
            from gateway.cli.worker import run_worker

            run_worker(_with_redis(config), options.name, reporter)
    return 0


def _serve(config: Config) -> int:
    from gateway.cli.check import problems
    from gateway.cli.supervisor import StartFailed, serve

    found = problems(config)
    if found:
        raise ConfigError(*found)
    try:
        serve(config)
    except StartFailed as error:
        print(f"\nbaton: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _check(config: Config) -> int:
    from gateway.cli.check import options, problems, summary
    from gateway.cli.pairing import alone, pairs

    found = problems(config) or list(options(config))
    met = [] if found else pairs(config)
    found += alone(config, met)
    if found:
        raise ConfigError(*found)
    print("\n".join(["ok", summary(config), *(f"pair     {it.line}" for it in met)]))
    return 0


def _explain(options: argparse.Namespace) -> int:
    from gateway.cli.layout import explain_layouts

    lines = explain_layouts(
        options.source, options.target, options.tokens, allow_unlike=options.allow_unlike_weights
    )
    print("\n".join(lines))
    return 0


def _export(options: argparse.Namespace) -> int:
    from backends.errors import BackendMisconfigured
    from gateway.cli.export import export
    from gateway.text.errors import ModelUnreadable

    try:
        path = export(options.model, options.folder)
    except (ValueError, ModelUnreadable, BackendMisconfigured) as error:
        raise ConfigError(Problem("model", "", str(error))) from error
    print(f"{path} is now {options.folder}")
    return 0


def _with_redis(config: Config) -> Config:
    if not config.redis.url:
        message = "is required here; only `baton serve` starts a Redis of its own"
        raise ConfigError(Problem("redis.url", "", message))
    return config


def _load(options: argparse.Namespace) -> Config:
    flags: dict[str, Any] = {}
    if options.command == "worker":
        options.name = options.name or options.role or ""
        if not options.name:
            raise ConfigError(Problem("", "", "give --role, or --name of a configured worker"))
        for field in ("role", "backend", "listen", "data_host"):
            if getattr(options, field) is not None:
                flags[f"workers.{options.name}.{field}"] = getattr(options, field)
    for flag, path in (
        ("data_dir", "data_dir"),
        ("model", "model.source"),
        ("redis_url", "redis.url"),
        ("host", "gateway.host"),
        ("port", "gateway.port"),
    ):
        if getattr(options, flag, None) is not None:
            flags[path] = getattr(options, flag)
    config = load(options.config, flags=flags, with_workers=options.command in ("serve", "check"))
    if options.command == "worker" and options.name not in config.workers:
        message = "there is no such worker; give --role to describe one here"
        raise ConfigError(Problem(f"workers.{options.name}", "", message))
    return config


def _count(text: str) -> int:
    count = int(text)
    if not 1 <= count <= MOST_TOKENS:
        raise ValueError(text)
    return count


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="baton",
        description="Serve large language models with prefill and decode on different devices.",
    )
    parser.add_argument("--version", action="version", version=f"baton {version('baton-gateway')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings")
    common.add_argument("--data-dir", metavar="DIR", help="folder for logs and data")
    common.add_argument("--model", metavar="SOURCE", help="`bundled`, a .gguf file or a folder")
    common.add_argument("--redis-url", metavar="URL", help="a Redis server of your own")
    web = argparse.ArgumentParser(add_help=False)
    web.add_argument("--host", help="address to listen on")
    web.add_argument("--port", type=int, help="TCP port to listen on")
    commands.add_parser("serve", parents=[common, web], help="run everything on this machine")
    commands.add_parser("gateway", parents=[common, web], help="run the HTTP side alone")
    worker = commands.add_parser("worker", parents=[common], help="run one worker")
    worker.add_argument("--role", choices=("prefill", "decode", "both"))
    worker.add_argument("--backend", metavar="NAME", help="plug-in that computes")
    worker.add_argument("--name", help="its name, and its section [workers.NAME]; default: role")
    worker.add_argument("--listen", metavar="ADDRESS", help="unix:/path or tcp:host:port")
    worker.add_argument("--data-host", metavar="HOST", help="address for KV from other workers")
    commands.add_parser(
        "check", parents=[common, web], help="say what is wrong with the configuration"
    )
    keys = commands.add_parser("keys", help="add, list and revoke API keys")
    add_key_arguments(keys, common)
    commands.add_parser("settings", help="print the table of all settings")
    add_conformance_arguments(
        commands.add_parser("conformance", help="say whether a plug-in keeps its promises")
    )
    folder = commands.add_parser(
        "export", help="write a GGUF model as a Hugging Face folder, for engines that read those"
    )
    folder.add_argument("--model", metavar="SOURCE", default="bundled", help="or a .gguf file")
    folder.add_argument("folder", type=Path, metavar="FOLDER", help="a new or an empty one")
    layout = commands.add_parser("layout", help="say how one KV layout becomes another")
    explain = layout.add_subparsers(required=True, metavar="explain").add_parser(
        "explain", help="print the plan, its runs and bytes, and what it costs on this machine"
    )
    explain.add_argument("source", type=Path, help="TOML or JSON file of the prefill side's layout")
    explain.add_argument("target", type=Path, help="the same of the decode side's")
    explain.add_argument("--tokens", type=_count, default=1024, help="length of the prompt")
    explain.add_argument("--allow-unlike-weights", action="store_true")
    roofline = commands.add_parser(
        "roofline", help="say how fast an accelerator would be, by its figures"
    )
    add_roofline_arguments(roofline)
    return parser
