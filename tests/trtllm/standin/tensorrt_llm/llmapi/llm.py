"""`LLM`: validates, starts the ranks, hands requests in and answers out."""

import itertools
import pickle
import threading
from inspect import Parameter, Signature
from multiprocessing.connection import wait

from tensorrt_llm.executor import utils
from tensorrt_llm.executor.result import RequestOutput
from tensorrt_llm.executor.utils import RequestError
from tensorrt_llm.llmapi.llm_args import TorchLlmArgs
from tensorrt_llm.sampling_params import SamplingParams
from tensorrt_llm.standin.flavour import since
from tensorrt_llm.standin.knobs import Knobs
from tensorrt_llm.standin.processes import start_ranks


class _LLM:
    def __init__(self, model, tokenizer=None, **kwargs):
        self.args = TorchLlmArgs(model=model, tokenizer=tokenizer, **kwargs)
        self.tokenizer = None
        self._results = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._down = self._dead = None
        self.pinned, self.free_blocks = 0, None
        world = self.args.tensor_parallel_size
        self._connection, self._ends, self.ranks = start_ranks(
            pickle.dumps(self.args.model_dump()), Knobs.read(), world, self.args.env_overrides
        )
        kind, failure = self._first_word()
        if kind != "up" or failure is not None:
            raise failure or RuntimeError("a rank died as it started")
        threading.Thread(target=self._listen, daemon=True, name="answers").start()

    def _first_word(self):
        while True:
            ready = wait([self._connection, *self._ends])
            if self._connection in ready:
                return self._connection.recv()
            return "dead", None

    def _listen(self):
        while True:
            ready = wait([self._connection, *self._ends])
            try:
                if self._connection not in ready:
                    raise EOFError
                kind, *rest = self._connection.recv()
            except (EOFError, OSError):
                self._die("a rank is gone")
                return
            if kind == "dead":
                self._die(rest[0])
                return
            if kind == "pinned":
                self.pinned, self.free_blocks = rest
                continue
            client, tokens, reason, reused = rest
            result = self._results.pop(client, None)
            if result is not None:
                if hasattr(result, "cached_tokens"):
                    result.cached_tokens = reused
                result.put((tokens, reason))

    def _die(self, why):
        with self._lock:
            self._dead = why
            results, self._results = self._results, {}
        if since("1.3"):  # with 1.2 whoever waits for an answer waits for ever
            for result in results.values():
                result.put(utils.EngineDeadError(why))

    def _submit(self, inputs, sampling_params, streaming, salt, disagg):
        if self._down:
            raise RuntimeError("LLM is shutting down")
        if self._dead and since("1.3"):
            raise utils.EngineDeadError(self._dead)
        tokens = inputs["prompt_token_ids"] if isinstance(inputs, dict) else list(inputs)
        params = sampling_params or SamplingParams()
        limit = self._check(tokens, params, disagg)
        if streaming:
            raise NotImplementedError("streaming")
        number = next(self._numbers)
        result = RequestOutput(number, tokens, self._abort)
        if since("1.3"):
            result.cached_tokens = 0
        self._results[number] = result
        chosen = {"max_tokens": limit, "end_id": -1 if params.ignore_eos else params.end_id}
        with self._lock:
            if not self._dead:
                self._connection.send(("request", number, tokens, chosen, disagg, salt))
        return result

    def _check(self, tokens, params, disagg):
        kind = disagg.request_type if disagg is not None else None
        if params.end_id is None and self.args.skip_tokenizer_init:
            raise ValueError("end_id is required where the tokenizer is not initialized")
        if kind not in (None, "context_and_generation") and not self.args.cache_transceiver_config:
            raise RequestError(
                "kv_cache_transceiver is disabled, please set 'cache_transceiver_config'"
            )
        limit = 1 if kind == "context_only" else params.max_tokens
        if limit <= 0:
            raise ValueError("max_tokens must be positive")
        if not tokens:
            raise ValueError("the prompt is empty")
        if not self.args.enable_chunked_prefill and len(tokens) > self.args.max_num_tokens:
            raise ValueError("the prompt is longer than max_num_tokens")
        if self.args.max_seq_len and len(tokens) + limit > self.args.max_seq_len:
            raise ValueError("the prompt and max_tokens exceed max_seq_len")
        return limit

    def _abort(self, number):
        with self._lock:
            if not self._dead and not self._down:
                self._connection.send(("cancel", number))

    def generate(self, inputs, sampling_params=None, disaggregated_params=None):
        return self.generate_async(
            inputs, sampling_params, disaggregated_params=disaggregated_params
        ).result()

    def shutdown(self):
        with self._lock:
            if self._down:
                return
            self._down = True
            if not self._dead:
                self._connection.send(("stop",))
        for rank in self.ranks:
            rank.join(5)


ASKED = [
    "inputs",
    *("sampling_params", "lora_request", "prompt_adapter_request", "streaming"),
    *("kv_cache_retention_config", "disaggregated_params", "trace_headers", "_postproc_params"),
    "scheduling_params",
    *(["conversation_params"] if since("main") else []),
    "cache_salt",
    *(["priority"] if since("1.3") else []),
]
"""The parameters of `generate_async`; all but the first have defaults."""

SIGNATURE = Signature(
    Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=default)
    for name, default in [
        ("self", Parameter.empty),
        *((name, None if place else Parameter.empty) for place, name in enumerate(ASKED)),
    ]
)


class LLM(_LLM):
    def generate_async(self, *positional, **named):
        given = SIGNATURE.bind(self, *positional, **named).arguments
        wanted = ("inputs", "sampling_params", "streaming", "cache_salt", "disaggregated_params")
        return self._submit(*(given.get(name) for name in wanted))

    generate_async.__signature__ = SIGNATURE
