"""The two classes that TensorRT-LLM imports by name, in each of its ranks.

They do nothing but pass on: `scheduling.py` and `exporting.py` know what to do, and need no
TensorRT-LLM. What is raised in here while the library runs ends it, so nothing is.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from backends.tensorrt_llm.exporting import Exporter
from backends.tensorrt_llm.geometry import measured
from backends.tensorrt_llm.leash import end_without
from backends.tensorrt_llm.messages import Close, Line, Pass, Scheduling, ToRank, decode_pass
from backends.tensorrt_llm.probe import BY_DIGEST, connector_api, takes_many_back
from backends.tensorrt_llm.scheduling import Schedule

api = connector_api()


class ExportScheduler(api.KvCacheConnectorScheduler):  # type: ignore[misc,name-defined]
    """Rank 0's half: says which blocks are final after each pass, and when a request is over."""

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        self._line = Line(Scheduling(), self._heard)
        self._schedule = Schedule(
            self._line.send,
            block_tokens=llm_args.kv_cache_config.tokens_per_block,
            by_id=BY_DIGEST not in os.environ,
        )

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """Nothing is loaded from elsewhere."""
        self._schedule.admit(request, num_computed_tokens)
        return 0, False

    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        """Some or all of a prompt's blocks are there; the passes tell which."""
        self._schedule.allocated(request.request_id, len(block_ids))

    def update_state_after_alloc_by_layer_group(
        self, request: Any, block_ids_by_layer_group: list[list[int]]
    ) -> None:
        """The same for releases with several groups of layers; of those we take only one."""
        self._schedule.allocated(request.request_id, len(block_ids_by_layer_group[0]))

    def build_connector_meta(self, scheduler_output: Any) -> bytes:
        """What goes to all ranks before a pass."""
        if scheduler_output is None:
            return self._schedule.next_pass()
        return self._schedule.next_pass(
            scheduler_output.new_requests, scheduler_output.cached_requests
        )

    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        """Whether the blocks are still read."""
        return self._schedule.finished(request.request_id, len(cache_block_ids))

    def request_finished_by_layer_group(
        self, request: Any, cache_block_ids_by_layer_group: list[list[int]]
    ) -> bool:
        """The same for releases with several groups of layers."""
        return self._schedule.finished(request.request_id, len(cache_block_ids_by_layer_group[0]))

    def _heard(self, message: ToRank | None, _files: list[int]) -> None:
        if isinstance(message, Close):
            self._schedule.forget(message.request)


class ExportWorker(api.KvCacheConnectorWorker):  # type: ignore[misc,name-defined]
    """Each rank's half: has what is final copied, and says which blocks are read no more."""

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        self._cuda = False
        self._line: Line | None = None
        self._told: Pass | None = None
        self._exporter = Exporter(self._say, one_at_a_time=not takes_many_back())

    def register_kv_caches(self, kv_cache_tensor: torch.Tensor) -> None:
        """Take the pool, [block, layer, plane, row].

        Raises:
            BackendMisconfigured: it is of no shape that we know; ends the library's start.
        """
        geometry = measured(kv_cache_tensor, self._llm_args)
        self._cuda = kv_cache_tensor.is_cuda
        self._exporter.register(kv_cache_tensor.view(torch.uint8), geometry.block_tokens)
        self._line = Line(geometry, self._heard)

    def start_load_kv(self, stream: Any) -> None:
        """Nothing is loaded; but from now on the pass writes to the blocks it was given."""
        metadata = self.get_connector_meta()
        self._told = decode_pass(metadata) if metadata else None
        if self._told is not None:
            self._exporter.before_pass(self._told)

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        """Nothing is loaded."""

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        """A pass is exported as a whole; CUDA graphs would leave these calls out."""

    def wait_for_save(self, stream: Any) -> None:
        """The pass is queued on the device: have it copied once the device is through with it."""
        if self._told is None:
            return
        event = None
        if self._cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        self._exporter.after_pass(event, self._told)

    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        """Which requests' blocks may go, of those that were ever named here; each once."""
        return self._exporter.finished(finished_gen_req_ids), list(started_loading_req_ids)

    def _heard(self, message: ToRank | None, files: list[int]) -> None:
        self._exporter.heard(message, files)
        if message is None and self._line is not None:
            end_without(self._line.peer)

    def _say(self, message: Any) -> None:
        if self._line is not None:
            self._line.send(message)
