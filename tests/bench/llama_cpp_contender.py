"""llama.cpp on the same file, through the C functions of `llama_cpp`, as a `Contender`."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.bench.contenders import Work, prompt


class LlamaCpp:
    """The GGUF file as it is stored (its quantisation, float16 KV): less to read than float32."""

    name = "llama.cpp"

    def __init__(self, model: Path, context_tokens: int, sequences: int) -> None:
        import llama_cpp

        self._c: Any = llama_cpp
        quiet = llama_cpp.llama_log_callback(lambda *_: None)
        self._quiet = quiet  # must outlive the library's use of it
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        from backends.llamacpp.library import model_params

        self._model = llama_cpp.llama_model_load_from_file(str(model).encode(), model_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {model}")
        using = llama_cpp.llama_context_default_params()
        using.n_ctx = context_tokens
        using.n_batch = context_tokens
        using.n_ubatch = min(2048, context_tokens)
        using.n_seq_max = sequences
        using.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(self._model, using)
        if not self._context:
            raise SystemExit(f"llama.cpp refuses {context_tokens} tokens, {sequences} sequences")
        self._memory = llama_cpp.llama_get_memory(self._context)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._batch = llama_cpp.llama_batch_init(context_tokens, 0, 1)

    def set_threads(self, threads: int) -> None:
        self._c.llama_set_n_threads(self._context, threads, threads)

    def prefill(self, tokens: int) -> Work:
        ids = prompt(tokens, self._vocabulary)

        def work() -> None:
            self._c.llama_memory_clear(self._memory, True)
            self._compute([(token, place, 0) for place, token in enumerate(ids)], last=True)

        return work

    def decode(self, batch: int, context: int) -> Work:
        ids = prompt(context, self._vocabulary)
        self._c.llama_memory_clear(self._memory, True)
        self._compute([(token, place, 0) for place, token in enumerate(ids[:-1])], last=True)
        for copy in range(1, batch):
            self._c.llama_memory_seq_cp(self._memory, 0, copy, -1, -1)
        rows = [(ids[-1], context - 1, copy) for copy in range(batch)]

        def work() -> None:
            self._compute(rows, last=False)
            for copy in range(batch):
                self._c.llama_memory_seq_rm(self._memory, copy, context - 1, -1)

        return work

    def _compute(self, rows: Iterable[tuple[int, int, int]], *, last: bool) -> None:
        """Compute (token, position, sequence) rows; logits of all of them, or of the last."""
        batch, count = self._batch, 0
        for token, position, sequence in rows:
            batch.token[count] = token
            batch.pos[count] = position
            batch.n_seq_id[count] = 1
            batch.seq_id[count][0] = sequence
            batch.logits[count] = not last
            count += 1
        batch.logits[count - 1] = True
        batch.n_tokens = count
        code = self._c.llama_decode(self._context, batch)
        if code:
            raise SystemExit(f"llama.cpp could not compute {count} tokens: {code}")
        self._c.llama_synchronize(self._context)
