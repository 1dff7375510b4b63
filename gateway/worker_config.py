"""The settings of one worker; as `config.py`, of which this is a part, it only declares."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from gateway.declaring import Section, about

Role = Literal["prefill", "decode", "both"]
Transport = Literal["auto", "shm", "nixl", "tcp"]
Wire = Literal["int8", "float8_e4m3"]


class WorkerSection(Section, frozen=True):
    """`[workers.NAME]`: one worker that `baton serve` starts, or `baton worker --name NAME`."""

    role: Annotated[Role, about("What it does.")]
    backend: Annotated[
        str, about("Plug-in that computes (entry point group `baton.backends`).", min_length=1)
    ] = "emulation"
    listen: Annotated[
        str,
        about("Control address: `unix:/path` or `tcp:host:port`. Empty: a private Unix socket."),
    ] = ""
    data_host: Annotated[
        str,
        about(
            "Address of this machine on which other workers reach its KV pool; gateways use it too"
            " when `listen` is every address (`tcp:0.0.0.0:port`).",
            min_length=1,
        ),
    ] = "127.0.0.1"
    lease_seconds: Annotated[
        float,
        about(
            "How long blocks wait for a handoff that has not begun or stopped arriving.",
            unit="s",
            gt=0,
        ),
    ] = 60.0
    drain_seconds: Annotated[
        float,
        about(
            "Time for running requests to finish when the worker stops or is drained; those that"
            " still run then go on elsewhere.",
            unit="s",
            ge=0,
            le=86400,
        ),
    ] = 10.0
    step_tokens: Annotated[
        int,
        about(
            "Most tokens computed in one step; longer prompts are cut into chunks.",
            unit="tokens",
            ge=1,
            le=1 << 20,
        ),
    ] = 512
    step_timeout_seconds: Annotated[
        float,
        about(
            "A step that takes longer, or an engine that owes an answer for longer, ends the"
            " worker, and what it had goes on elsewhere.",
            unit="s",
            gt=0,
            le=86400,
        ),
    ] = 120.0
    max_waiting: Annotated[int, about("Most requests that wait inside the worker.", ge=0)] = 256
    threads: Annotated[
        int, about("Threads that compute; 0 leaves it to the library.", ge=0, le=1024)
    ] = 0
    cpus: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=0, le=4095)], ...],
        about("CPUs that it is pinned to. Empty: all."),
    ] = ()
    transports: Annotated[
        tuple[Transport, ...],
        about(
            "Ways in which KV may reach or leave it; the fastest that a pair has is taken. `auto`:"
            " all that are there. `shm` needs both workers on one machine, `nixl` its library,"
            " `tcp` reaches anywhere.",
            min_length=1,
        ),
    ] = ("auto",)
    wire: Annotated[
        tuple[Wire, ...],
        about(
            "Lossy codes in which KV may reach or leave it: a pair of workers that both have some"
            " uses them where that is faster than sending the numbers. Not between two workers"
            " whose backends are exact, nor where their weights are unlike."
        ),
    ] = ()
    unlike_weights: Annotated[
        bool,
        about(
            "Whether it may hand KV to workers whose weights have another precision, and take it"
            " from them (both ends must allow it). The text of such a pair is that of neither"
            " engine alone; `/admin/workers` shows it, and `reuse` is not on by itself."
        ),
    ] = False
    quarantine_share: Annotated[
        float,
        about(
            "Part of its pool that one prefill worker may be able to write to: its landings, and"
            " withdrawn ones of which it has not yet said that it writes no more. Beyond that it"
            " is given none.",
            gt=0,
            le=1,
        ),
    ] = 0.5
    reuse: Annotated[
        Literal["auto", "on", "off"],
        about(
            "Whether KV of finished prompts and answers is kept for later prompts that begin alike,"
            " until its room is needed. `auto`: where that changes no text (float32, or a backend"
            " that is exact)."
        ),
    ] = "auto"
    faults: Annotated[str, about("Faults to inject, for tests of recovery. Empty: none.")] = ""
    options: Annotated[
        dict[str, Any], about("Options of the backend, passed to it as keyword arguments.")
    ] = msgspec.field(default_factory=dict)
