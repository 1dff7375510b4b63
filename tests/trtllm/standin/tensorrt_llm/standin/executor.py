"""The executor's loop on one rank, in the order in which the library makes its calls.

Gates: `before_pass`, `after_chunk` (a pass is over, its prompt is not), `before_finish`
(the last pass is over, `request_finished` not yet called), `answered` (nor then, but the client has
its answer), `pinned` (after that), `poll`.
"""

import importlib
import itertools
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from tensorrt_llm.bindings import LlmRequestState as State
from tensorrt_llm.standin import comm, model
from tensorrt_llm.standin.connector_api import RequestData, SchedulerOutput
from tensorrt_llm.standin.flavour import since
from tensorrt_llm.standin.pool import Pool
from tensorrt_llm.standin.refusals import refuse
from tensorrt_llm.standin.request import PyRequest

MIN_GLOBAL_ID = 1 << 40


class Executor:
    """One rank. `inbox` and `outbox` are rank 0's connection to the client's process."""

    def __init__(self, args, knobs, talk, inbox=None):
        self._args, self._knobs, self._talk, self._inbox = args, knobs, talk, inbox
        self._rank = talk.rank
        refuse(args)
        self.scheduler = self.worker = None
        if args.kv_connector_config is not None:
            self._construct(args.kv_connector_config)
        config = args.kv_cache_config
        self._v2 = getattr(config, "use_kv_cache_manager_v2", False)
        size = config.tokens_per_block
        self.shape = model.shape(args)
        self.pool = Pool(
            self.shape,
            blocks=max(1, (config.max_tokens or 4096) // size),
            rank=self._rank,
            tp=args.tensor_parallel_size,
            tokens_per_block=size,
            order=knobs.order,
            reuse=config.enable_block_reuse and args.attn_backend == "TRTLLM",
            nhd=args.attn_backend == "FLASHINFER",
        )
        self._numbers = itertools.count(args.max_batch_size)
        self._waiting, self._active = deque(), []
        self._new_saving, self._pending, self._local = {}, {}, {}
        self._known = {}  # request id -> (tokens, blocks) told; never purged, as in the library
        self._last = []  # overlap: the batch whose results are looked at next turn
        self._stopped = False
        self._register()

    # ---- bring-up

    def _construct(self, config):
        module = importlib.import_module(config.connector_module)

        def make(name):
            comm.enter(self._talk)
            return getattr(module, name)(self._args)

        with ThreadPoolExecutor(2) as threads:
            worker = threads.submit(make, config.connector_worker_class)
            if self._rank == 0:
                self.scheduler = threads.submit(make, config.connector_scheduler_class).result()
            self.worker = worker.result()

    def _register(self):
        if self.worker is None:
            return
        if since("main") and self._v2:
            self.worker.register_kv_cache_layout(self._layout())
        else:
            self.worker.register_kv_caches(self.pool.tensor)
        if since("1.3") and self.scheduler is not None:
            self.scheduler.wait_for_initialization()

    def _layout(self):
        from tensorrt_llm._torch.pyexecutor.connectors.kv_cache_layout import (
            KvCacheBufferRef,
            KvCacheLayerGroupLayout,
            KvCacheLayout,
            KvCacheRegion,
        )

        tensor = self.pool.tensor
        layers = tuple(range(tensor.shape[1]))
        cuts = [layers[:1], layers[1:]] if self._knobs.separate_pools else [layers]
        row = tensor.stride(0) * tensor.element_size()
        groups = tuple(
            KvCacheLayerGroupLayout(
                number,
                some,
                None,
                (
                    KvCacheRegion(
                        tensor.data_ptr(),
                        row,
                        row,
                        tensor.shape[0],
                        tuple(
                            KvCacheBufferRef(it, role) for it in some for role in ("key", "value")
                        ),
                    ),
                ),
            )
            for number, some in enumerate(cuts)
        )
        single = None if self._knobs.separate_pools else tensor
        return KvCacheLayout(self.pool.size, tensor.dtype, groups, single)

    # ---- the loop

    def run(self):
        while not self._stopped:
            self._fetch()
            if self._stopped:
                return
            self._turn()

    def _fetch(self):
        """Take in what has arrived; an idle executor waits for it and does nothing else."""
        idle = not self._active and not self._waiting and not self._last
        arrived = []
        if self._inbox is not None:
            if idle and not self._knobs.idle_polls:
                arrived.append(self._received())
            elif idle:
                self._inbox.poll(0.002)
            while self._inbox.poll():
                arrived.append(self._received())
        for kind, *rest in self._talk.broadcast(arrived):
            if kind == "stop":
                self._stopped = True
            elif kind == "request":
                number = next(self._numbers)
                chunk = self._args.max_num_tokens
                self._waiting.append(PyRequest(*rest, number=number, chunk=chunk))
            elif kind == "cancel":
                for request in [*self._waiting, *self._active]:
                    if request.client == rest[0]:
                        request.cancelled = True

    def _received(self):
        try:
            return self._inbox.recv()
        except (EOFError, OSError):  # the client's process is gone
            return ("stop",)

    def _turn(self):
        batch = self._schedule()
        metadata = self._start(batch)
        if batch:
            self._forward(batch, metadata)
        if self._args.disable_overlap_scheduler:
            self._settle(batch)
        else:
            previous, self._last = self._last, batch
            self._settle(previous)
        self._handle_cancelled()
        self._poll()

    def _schedule(self):
        """New requests that have room get their blocks; then every active one has its turn."""
        while self._waiting and len(self._active) < self._args.max_batch_size:
            request = self._waiting[0]
            wanted = -(-(request.prompt_len + request.max_new_tokens) // self.pool.size)
            if self.pool.free < wanted:
                break
            self._waiting.popleft()
            self._seat(request)
            self._active.append(request)
        budget = self._args.max_num_tokens
        batch = []
        for request in self._active:
            if request.is_context_finished:
                wanted = 0 if self._ends_by_itself(request) else 1
            else:
                wanted = min(request.context_remaining_length, budget)
                request.context_chunk_size = wanted
            if 0 < wanted <= budget and self._grow(request, wanted):
                batch.append(request)
                budget -= wanted
        return batch

    def _ends_by_itself(self, request):
        """Whether its last token is on its way; 1.2 has one more computed meanwhile (overlap)."""
        ahead = sum(1 for it in self._last if it is request)
        return since("1.3") and len(request.generated) + ahead >= request.max_new_tokens

    def _seat(self, request):
        tokens = request.get_tokens(0)
        shared = self.pool.share(tokens, request.salt)
        request.reused = request.context_current_position = len(shared) * self.pool.size
        request.blocks = shared
        if self.worker is not None:
            matched = self._leader("get_num_new_matched_tokens", request.seen(), request.reused)
            if matched[0] == 0 and matched[1]:
                raise RuntimeError("load_kv_async must be False when num_tokens is 0!")
        end = min(request.prompt_len, self._args.max_num_tokens + request.reused)
        self._cover(request, end if self._v2 else request.prompt_len)
        if self.scheduler is not None:
            if since("main") and self._v2:
                name, blocks = "update_state_after_alloc_by_layer_group", [list(request.blocks)]
            else:
                name, blocks = "update_state_after_alloc", list(request.blocks)
            getattr(self.scheduler, name)(request.seen(), blocks)

    def _grow(self, request, count):
        if request.is_context_finished:
            self._cover(request, len(self._known_to_the_device(request)))
        else:
            self._cover(request, request.context_current_position + count)
        return True

    def _known_to_the_device(self, request):
        """All tokens, those included that were sampled but not yet looked at (overlap)."""
        ahead = sum(1 for it in self._last if it is request)
        number = len(request.generated)
        return request.get_tokens(0) + [self._token(request, number + it) for it in range(ahead)]

    def _cover(self, request, tokens):
        missing = -(-tokens // self.pool.size) - len(request.blocks)
        if missing > 0:
            request.blocks += self.pool.take(missing)

    def _start(self, batch):
        if self.worker is None:
            return None
        output = SchedulerOutput()
        for request in batch:
            new = request.request_id not in self._known
            data = self._data(request)
            (output.new_requests if new else output.cached_requests).append(data)
        if not batch:
            return None
        metadata = self._leader("build_connector_meta", output)
        self.worker.bind_connector_meta(metadata)
        self.worker.start_load_kv(None)
        return metadata

    def _data(self, request):
        tokens, blocks = self._known.setdefault(request.request_id, ([], []))
        everything = request.get_tokens(0)
        new_tokens = everything[len(tokens) :]
        new_blocks = request.blocks[len(blocks) :]
        tokens += new_tokens
        blocks += new_blocks
        if self._knobs.hole and len(new_blocks) > 1:
            new_blocks = [-1, *new_blocks[1:]]
        if request.is_context_finished:
            position, count = len(everything) - 1, 1
        else:
            position, count = request.context_current_position, request.context_chunk_size
        data = RequestData(request.request_id, new_tokens, new_blocks, position, count)
        if since("main"):
            data.cache_salt = request.salt
            data.new_block_ids_by_layer_group = [new_blocks] if self._v2 else []
        elif since("1.3"):
            data.cache_salt_id = request.cache_salt_id
        return data

    def _forward(self, batch, metadata):
        self._knobs.gate("before_pass", self._rank)
        if self._knobs.slow_rank == self._rank:
            time.sleep(0.05)
        if self._knobs.pass_seconds:
            time.sleep(self._knobs.pass_seconds)
        self.pool.begin_pass()
        for request in batch:
            if request.is_context_finished:
                tokens = self._known_to_the_device(request)
                self.pool.write(tokens, len(tokens) - 1, len(tokens), request.blocks)
            else:
                start = request.context_current_position
                end = start + request.context_chunk_size
                self.pool.write(request.get_tokens(0), start, end, request.blocks)
                request.context_current_position = end
        if self.worker is not None:
            for layer in range(self.shape[0]):
                self.worker.wait_for_layer_load(layer, None)
                self.worker.save_kv_layer(layer, None)
            self.worker.wait_for_save(None)
        if any(not request.is_context_finished for request in batch):
            self._knobs.gate("after_chunk", self._rank)

    def _settle(self, batch):
        """Sample for those whose prompt is through; whoever is done is told to the connector."""
        for request in batch:
            if not request.is_context_finished or request not in self._active:
                continue
            token = self._token(request, len(request.generated))
            request.generated.append(token)
            request._tokens.append(token)
            end = request.params["end_id"]
            stopped = token == end and end >= 0
            if stopped or len(request.generated) >= request.max_new_tokens:
                request.is_finished_due_to_length = not stopped
                self._finish(request, "stop" if stopped else "length")

    def _token(self, request, number):
        end = request.params["end_id"]
        if self._knobs.first_is_end and number == 0 and end >= 0:
            return end
        return (sum(request._tokens[: request.prompt_len]) * 31 + number * 7 + 3) % 97

    def _finish(self, request, reason):
        self._knobs.gate("before_finish", self._rank)
        self._active.remove(request)
        request.state = State.GENERATION_COMPLETE
        self._cover(request, request.prompt_len + len(request.generated))
        self._part_with(request, reason)
        self._knobs.gate("pinned", self._rank)

    def _part_with(self, request, reason):
        """Answer and ask the connector, in one order or the other."""
        if self._knobs.respond == "before":
            self._respond(request, reason)
            self._knobs.gate("answered", self._rank)
        self._retire(request)
        if self._knobs.respond != "before":
            self._respond(request, reason)

    def _retire(self, request):
        """Ask whether the blocks are still read; pin them, or let them go."""
        saving = False
        if self.worker is not None:
            if since("main") and self._v2:
                name, blocks = "request_finished_by_layer_group", [list(request.blocks)]
            else:
                name, blocks = "request_finished", list(request.blocks)
            saving = self._leader(name, request, blocks)
        if saving:
            request.state = State.DISAGG_CONTEXT_TRANS_IN_PROGRESS
            self._new_saving[request.request_id] = request
        self._leave(request, saving)

    def _leave(self, request, saving):
        """Keep its tokens' blocks for others; those that are still read stay besides.

        Until 1.2 the blocks that are kept were pinned, not the request's own, and a prompt was
        taken to be computed when it was not.
        """
        tokens = request.get_tokens(0)
        until = request.context_current_position if since("1.3") else len(tokens) - 1
        kept = self.pool.keep(request.blocks, tokens[:until], request.salt)
        if not saving:
            self.pool.drop(request.blocks)
        elif kept and not since("1.3"):
            self.pool.hold(kept)
            self.pool.drop(request.blocks)
            request.blocks = kept

    def _handle_cancelled(self):
        """One that waits behind a full batch is dropped without an answer, as in the library."""
        for request in [it for it in self._waiting if it.cancelled]:
            self._waiting.remove(request)
            if len(self._active) < self._args.max_batch_size:
                self._respond(request, "cancelled")
        for request in [it for it in self._active if it.cancelled]:
            self._active.remove(request)
            if self._knobs.cancel == "hook":
                self._part_with(request, "cancelled")
            else:
                self._leave(request, False)
                self._respond(request, "cancelled")

    def _poll(self):
        """Ask every rank what it is done with; what all are done with goes free."""
        if self.worker is None:
            return
        self._knobs.gate("poll", self._rank)
        fresh = list(self._new_saving)
        self._pending |= self._new_saving
        self._new_saving = {}
        saved, loaded = self.worker.get_finished(fresh, [])
        if loaded:
            raise KeyError(loaded[0])
        for number in saved:
            self._local[number] = self._pending.pop(number)
        everywhere = self._talk.allgather(list(self._local))
        done = [self._local.pop(it) for it in set.intersection(*map(set, everywhere))]
        for request in done if since("1.3") else done[:1]:  # 1.2 forgets the others
            self.pool.drop(request.blocks)
        if self._inbox is not None:
            self._inbox.send(("pinned", len(self._pending) + len(self._local), self.pool.free))

    # ---- the client's process

    def _respond(self, request, reason):
        if self._inbox is not None:
            tokens = list(request.generated)
            self._inbox.send(("answer", request.client, tokens, reason, request.reused))

    def _leader(self, name, *arguments):
        """Call the scheduler, which only rank 0 has; all ranks have its answer, pickled."""
        answer = None
        if self.scheduler is not None:
            answer = getattr(self.scheduler, name)(*arguments)
        return self._talk.broadcast(answer)
