"""The process in which vLLM runs: takes jobs from a socket, steps the engine, says what came of it.

Started by `child.py` as `python -m backends.vllm.process FD`. One thread does all: it reads what
has arrived, steps, and tells, so a job is aborted between two steps and its blocks are free at
once. The process ends when its socket does.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from backends.api import DecodeJob, Output, PrefillJob, Sampled, Sampling, Sequence
from backends.vllm.desk import Desk, register
from backends.vllm.messages import (
    Abort,
    Decoded,
    Ended,
    Failed,
    FromEngine,
    Imported,
    Inbox,
    Loaded,
    Pinned,
    Prefilled,
    Ready,
    Setup,
    TakeDecode,
    TakePrefill,
    ToEngine,
    Unfit,
    frame,
)
from backends.vllm.sampling import logprob, parameters, sampled
from transfer.shared_memory import Segment, attach

DESK = "arena"
PR_SET_PDEATHSIG = 1
_NOTHING_WANTED = Sequence(prompt=[], generated=[], sampling=Sampling(temperature=0.0), seed=0)


@dataclass(slots=True)
class Work:
    """A job and those of its requests that vLLM still has."""

    job: PrefillJob | DecodeJob
    open: set[str] = field(default_factory=set)
    pins: dict[str, int] = field(default_factory=dict)
    sampled: list[Sampled] = field(default_factory=list)
    output: Output | None = None
    cached: int = 0


class Loop:
    """All jobs of one engine."""

    def __init__(self, end: socket.socket, setup: Setup) -> None:
        self._end = end
        self._setup = setup
        self._inbox: Inbox[ToEngine] = Inbox(end, ToEngine)
        self._work: dict[str, Work] = {}
        self._of: dict[str, str] = {}
        segment = Segment(setup.arena_fd, 0, setup.arena_bytes)
        register(DESK, Desk(setup.layout, attach(segment), self))
        self._engine = _make_engine(setup)

    def run(self) -> None:
        """Work until the socket ends."""
        self._tell(Loaded(*_facts(self._engine)))
        while True:
            busy = self._engine.has_unfinished_requests()
            if not busy or select.select([self._end], [], [], 0)[0]:
                try:
                    for message in self._inbox.read():
                        self._hear(message)
                except EOFError:
                    return
            if self._engine.has_unfinished_requests():
                self._step()

    # ---- what the connector tells (`desk.Told`)

    def exported(self, job: str, start: int, end: int, layer: int | None) -> None:
        """KV is in the arena."""
        self._tell(Ready(job, start, end, layer))

    def imported(self, job: str) -> None:
        """KV has come from the arena."""
        self._tell(Imported(job))

    def pinned(self, job: str, request: str, blocks: int) -> None:
        """The scheduler gave a request blocks, or took them back."""
        work = self._work.get(job)
        if work is not None and work.pins.get(request, 0) != blocks:
            work.pins[request] = blocks
            self._tell(Pinned(job, sum(work.pins.values())))

    # ---- jobs

    def _hear(self, message: ToEngine) -> None:
        match message:
            case TakePrefill(job=job):
                self._take(job, self._prefill)
            case TakeDecode(job=job):
                self._take(job, self._decode)
            case Abort(job=name) if name in self._work:
                self._finish(name)

    def _take(self, job: Any, begin: Any) -> None:
        self._work[job.name] = Work(job)
        try:
            begin(job)
        except Exception as error:  # vLLM has many ways of refusing a request, of any base class
            self._tell(Failed(job.name, f"vLLM refuses it: {error}"))
            self._finish(job.name)

    def _prefill(self, job: PrefillJob) -> None:
        first = job.sequences[0] if job.sequences else _NOTHING_WANTED
        errand = {"arena": job.blocks, "tokens": len(job.tokens) if job.blocks else 0}
        self._ask(job, job.tokens, first, 1, errand, job.prompt_logprobs)

    def _decode(self, job: DecodeJob) -> None:
        sequence = job.sequence
        left = job.max_tokens - len(sequence.generated)
        imports = bool(job.blocks)
        errand = {"arena": job.blocks, "tokens": job.imported_tokens, "imports": imports}
        self._ask(job, job.context, sequence, left, errand, job.prompt_logprobs)

    def _ask(
        self,
        job: PrefillJob | DecodeJob,
        tokens: list[int],
        sequence: Sequence,
        most: int,
        errand: dict[str, Any],
        prompt_logprobs: int | None = None,
    ) -> None:
        """One request of vLLM's for a job; `errand` is for the connector."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        room = self._setup.options.context_tokens
        assert room is not None
        most = min(most, room + 1 - len(tokens))
        wishes = parameters(sequence, self._setup.end_tokens, most, prompt_logprobs)
        wishes["extra_args"] = {"kv_transfer_params": {**errand, "job": job.name}}
        work = self._work[job.name]
        name = f"{job.name}#{len(work.sampled)}"
        # Only requests of one salt share what vLLM keeps; without one, those of one job.
        prompt = {"prompt_token_ids": tokens, "cache_salt": job.salt.hex() or f"only {job.name}"}
        chosen = SamplingParams(output_kind=RequestOutputKind.DELTA, **wishes)
        self._of[name] = job.name
        work.open.add(name)
        self._engine.add_request(name, prompt, chosen)

    def _finish(self, name: str) -> None:
        """Take from vLLM whatever it still has of a job, which frees its blocks, and say so."""
        work = self._work.pop(name)
        if work.open:
            self._engine.abort_request(sorted(work.open))
        for request in [one for one, owner in self._of.items() if owner == name]:
            del self._of[request]
        self._tell(Ended(name))

    # ---- steps

    def _step(self) -> None:
        tokens: list[tuple[str, Sampled]] = []
        over: list[str] = []
        for output in self._engine.step():
            name = self._of.get(output.request_id)
            if name is None:
                continue
            work = self._work[name]
            if output.finished:
                work.open.discard(output.request_id)
            if isinstance(work.job, PrefillJob):
                self._note_prefill(work, output, over)
            else:
                self._note_decode(work, output, tokens, over)
        if tokens:
            self._tell(Decoded(tuple(tokens)))
        for name in over:
            self._finish(name)

    def _note_prefill(self, work: Work, output: Any, over: list[str]) -> None:
        job = work.job
        assert isinstance(job, PrefillJob)
        if work.output is None:
            logprobs = _prompt_logprobs(output, job.tokens, job.prompt_logprobs)
            work.output = Output((), logprobs)
            work.cached = output.num_cached_tokens or 0
        for completion in output.outputs:
            index = len(work.sampled)
            wanted = job.sequences[index].sampling.logprobs if job.sequences else None
            work.sampled += _tokens_of(completion, wanted)
        if not output.finished:
            return
        if len(work.sampled) < len(job.sequences):
            # The next sequence of the same prefix: its KV is there but for the last block.
            self._ask(job, job.tokens, job.sequences[len(work.sampled)], 1, {})
            return
        found = tuple(work.sampled) if job.sequences else ()
        whole = Output(found, work.output.prompt_logprobs)
        self._tell(Prefilled(job.name, whole, work.cached))
        over.append(job.name)

    def _note_decode(
        self, work: Work, output: Any, tokens: list[tuple[str, Sampled]], over: list[str]
    ) -> None:
        job = work.job
        assert isinstance(job, DecodeJob)
        if not job.blocks and work.output is None:
            logprobs = _prompt_logprobs(output, job.context, job.prompt_logprobs)
            work.output = Output((), logprobs)
            self._tell(Prefilled(job.name, work.output, output.num_cached_tokens or 0))
        for completion in output.outputs:
            found = _tokens_of(completion, job.sequence.sampling.logprobs)
            tokens += [(job.name, one) for one in found]
        if output.finished:
            over.append(job.name)

    def _tell(self, message: FromEngine) -> None:
        self._end.sendall(frame(message))


def _tokens_of(completion: Any, wanted: int | None) -> list[Sampled]:
    known = completion.logprobs or [None] * len(completion.token_ids)
    return [
        sampled(token, line, wanted)
        for token, line in zip(completion.token_ids, known, strict=True)
    ]


def _prompt_logprobs(output: Any, tokens: list[int], wanted: int | None) -> tuple[Any, ...]:
    if wanted is None or output.prompt_logprobs is None:
        return ()
    lines = output.prompt_logprobs[1:]
    return tuple(
        logprob(token, line, wanted) for token, line in zip(tokens[1:], lines, strict=True)
    )


def _make_engine(setup: Setup) -> Any:
    """An engine that knows no end token by itself.

    Those that a model's own generation config names it would not sample before `min_tokens`, even
    where they are to be ignored.
    """
    with TemporaryDirectory(prefix="baton-vllm-") as folder:
        (Path(folder) / "generation_config.json").write_text("{}")
        return _make_engine_of(setup, folder)


def _make_engine_of(setup: Setup, generation_config: str) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    options, layout = setup.options, setup.layout
    assert options.context_tokens is not None
    blocks = -(-options.cache_tokens // options.block_tokens) + 1  # the first is nobody's
    arguments = EngineArgs(
        model=options.model,
        skip_tokenizer_init=True,
        generation_config=generation_config,
        dtype=options.dtype,
        max_model_len=options.context_tokens + 1,
        block_size=options.block_tokens,
        kv_cache_memory_bytes=blocks * layout.block_bytes,
        max_num_seqs=options.max_batch,
        max_num_batched_tokens=max(options.step_tokens, options.max_batch),
        max_logprobs=-1,
        enforce_eager=not options.compile,
        enable_prefix_caching=True,
        async_scheduling=False,
        disable_log_stats=True,
        kv_transfer_config={
            "kv_connector": "BatonConnector",
            "kv_connector_module_path": "backends.vllm.connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"desk": DESK},
        },
    )
    return LLMEngine.from_engine_args(arguments)


def _facts(engine: Any) -> tuple[str, str]:
    import vllm

    layers = engine.vllm_config.compilation_config.static_forward_context
    return vllm.__version__, type(next(iter(layers.values())).impl).__name__


def main() -> None:
    """Serve the socket whose descriptor is the first argument."""
    end = socket.socket(fileno=int(sys.argv[1]))
    inbox: Inbox[ToEngine] = Inbox(end, ToEngine)
    messages: list[ToEngine] = []
    while not messages:
        messages = inbox.read()
    (setup,) = messages
    assert isinstance(setup, Setup)
    if setup.bound:  # one that is stopped would not see its socket end
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        loop = Loop(end, setup)
    except Exception as error:  # whatever vLLM refuses, the worker must hear why
        end.sendall(frame(Unfit(f"{type(error).__name__}: {error}")))
        raise
    loop.run()
    os._exit(0)  # vLLM's own threads would keep the process


if __name__ == "__main__":
    main()
