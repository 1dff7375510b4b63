"""llama.cpp through the C functions of `llama_cpp`: one model, one context, its memory.

What the library says goes nowhere but into the errors raised here. Blocks while it computes, and
lets other threads run meanwhile.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from backends.errors import BackendMisconfigured, StepFailed
from backends.llamacpp.state import TYPES, Form, State, check_probe

_BATCH_TOKENS = 512
_ERROR = 4
_NO_ROOM = 1
_complaints: deque[str] = deque(maxlen=4)


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _listen(level: int, text: bytes, _data: Any) -> None:
    if level == _ERROR:
        _complaints.append(text.decode("utf-8", "replace").strip())


def _said() -> str:
    """What the library has complained about since the last time."""
    said = "; ".join(_complaints)
    _complaints.clear()
    return said or "it does not say why"


class Context:
    """A loaded model with room for `cells` tokens, which up to `sequences` sequences share.

    KV is kept as `form` says; a version of the library that writes another state than
    `form` describes is refused.

    Raises:
        BackendMisconfigured: it cannot load the file, or is of a version that is not known.
    """

    def __init__(self, path: Path, form: Form, *, cells: int, sequences: int, threads: int) -> None:
        llama_cpp.llama_log_set(_listen, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        loading = model_params()
        self._context: Any = None
        self._model: Any = llama_cpp.llama_model_load_from_file(os.fsencode(path), loading)
        if not self._model:
            raise BackendMisconfigured(f"model: llama.cpp cannot load {path}: {_said()}")
        using = llama_cpp.llama_context_default_params()
        using.n_ctx = cells
        using.n_batch = using.n_ubatch = _BATCH_TOKENS
        using.n_seq_max = sequences
        using.kv_unified = True
        using.type_k = using.type_v = TYPES[form.dtype]
        using.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
            if form.transposed
            else llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        )
        using.n_threads = using.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, using)
        if not self._context:
            self.close()
            raise BackendMisconfigured(f"llama.cpp refuses {cells} tokens of context: {_said()}")
        self._memory = llama_cpp.llama_get_memory(self._context)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.vocabulary: int = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.batch_tokens: int = llama_cpp.llama_n_batch(self._context)
        self._batch = _Batch(self.batch_tokens)
        try:
            self._probe(form)
        except BaseException:
            self.close()
            raise

    def compute(
        self,
        tokens: Items[int],
        positions: Items[int],
        sequences: Items[int],
        wanted: Items[bool],
    ) -> bool:
        """Compute up to `batch_tokens` tokens; False: there is no room, and nothing has changed.

        Raises:
            StepFailed: the library could not.
        """
        self._batch.fill(tokens, positions, sequences, wanted)
        code = llama_cpp.llama_decode(self._context, self._batch.c)
        if code == _NO_ROOM:
            _complaints.clear()
            return False
        if code:
            raise StepFailed(f"llama.cpp answered {code} to {len(tokens)} tokens: {_said()}")
        return True

    def logits(self, place: int) -> NDArray[np.float32]:
        """Those of the token at that place of the last batch, until the next is computed."""
        row = llama_cpp.llama_get_logits_ith(self._context, place)
        return np.ctypeslib.as_array(row, (self.vocabulary,))

    def share(self, source: int, target: int, first: int, end: int) -> None:
        """See `cells.Memory`."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, first, end)

    def drop(self, sequence: int) -> None:
        """See `cells.Memory`."""
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def clear(self) -> None:
        """See `cells.Memory`."""
        llama_cpp.llama_memory_clear(self._memory, True)

    def read(self, sequence: int, state: State) -> None:
        """See `cells.Memory`."""
        size = len(state.raw)
        written = llama_cpp.llama_state_seq_get_data(
            self._context, _address(state.raw), size, sequence
        )
        if written != size:
            raise StepFailed(f"llama.cpp wrote {written} of {size} bytes of a state: {_said()}")

    def write(self, sequence: int, state: State) -> bool:
        """See `cells.Memory`."""
        size = len(state.raw)
        read = llama_cpp.llama_state_seq_set_data(
            self._context, _address(state.raw), size, sequence
        )
        if read not in (0, size):
            raise StepFailed(f"llama.cpp read {read} of {size} bytes of a state: {_said()}")
        return bool(read)

    def close(self) -> None:
        """Let go of context and model. Safe to call twice."""
        if self._context:
            llama_cpp.llama_free(self._context)
        if self._model:
            llama_cpp.llama_model_free(self._model)
        self._context = self._model = None

    def _probe(self, form: Form) -> None:
        if not self.compute([0], [0], [0], [False]):
            raise BackendMisconfigured(f"llama.cpp has no room for one token: {_said()}")
        written = np.zeros(llama_cpp.llama_state_seq_get_size(self._context, 0), np.uint8)
        llama_cpp.llama_state_seq_get_data(self._context, _address(written), len(written), 0)
        check_probe(form, written.tobytes())
        self.clear()


def model_params() -> Any:
    """How a model is loaded: on the CPU, in a way that does not crash."""
    loading = llama_cpp.llama_model_default_params()
    loading.n_gpu_layers = 0
    # Code for Intel's AMX crashes on quantised weights (ggml-org/llama.cpp#20824).
    loading.use_extra_bufts = b"AMX_INT8 = 1" not in llama_cpp.llama_print_system_info()
    return loading


class _Batch:
    """A `llama_batch` whose arrays are numpy's."""

    def __init__(self, most: int) -> None:
        self._tokens, self._positions, self._sequences = np.zeros((3, most), np.int32)
        self._counts = np.ones(most, np.int32)
        self._wanted = np.zeros(most, np.int8)
        addresses = self._sequences.ctypes.data + 4 * np.arange(most, dtype=np.uintp)
        self._addresses = addresses
        self.c = llama_cpp.llama_batch(
            n_tokens=0,
            token=_pointer(self._tokens, ctypes.c_int32),
            embd=None,
            pos=_pointer(self._positions, ctypes.c_int32),
            n_seq_id=_pointer(self._counts, ctypes.c_int32),
            seq_id=_pointer(addresses, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(self._wanted, ctypes.c_int8),
        )

    def fill(
        self,
        tokens: Items[int],
        positions: Items[int],
        sequences: Items[int],
        wanted: Items[bool],
    ) -> None:
        count = self.c.n_tokens = len(tokens)
        self._tokens[:count] = tokens
        self._positions[:count] = positions
        self._sequences[:count] = sequences
        self._wanted[:count] = wanted


def _pointer(array: NDArray[Any], kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))


def _address(array: NDArray[np.uint8]) -> Any:
    return _pointer(array, ctypes.c_uint8)
