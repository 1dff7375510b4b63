"""The connector's contract: two abstract classes and what they are called with."""

from abc import ABC, abstractmethod
from dataclasses import field, make_dataclass

from tensorrt_llm.standin.flavour import LACKING, since

_later = []
if since("main"):
    _later.append(("block_hashes", list, field(default_factory=list)))
if since("1.3"):
    _later.append(("priorities", object, field(default=None)))
if since("main"):
    _later += [
        ("cache_salt", object, field(default=None)),
        ("new_block_ids_by_layer_group", list, field(default_factory=list)),
    ]
elif since("1.3"):
    _later.append(("cache_salt_id", object, field(default=None)))

RequestData = make_dataclass(
    "RequestData",
    [
        ("request_id", int),
        ("new_tokens", list),
        ("new_block_ids", list),
        ("computed_position", int),
        *([] if "num_scheduled_tokens" in LACKING else [("num_scheduled_tokens", int)]),
        *_later,
    ],
    namespace={"__module__": __name__},
)


SchedulerOutput = make_dataclass(
    "SchedulerOutput",
    [
        ("new_requests", list, field(default_factory=list)),
        ("cached_requests", list, field(default_factory=list)),
        *([("attention_dp_rank", object, field(default=None))] if since("main") else []),
    ],
    namespace={"__module__": __name__},
)


class _Worker(ABC):
    def __init__(self, llm_args):
        self._llm_args = llm_args
        self._metadata = None
        super().__init__()

    def bind_connector_meta(self, metadata):
        self._metadata = metadata

    def get_connector_meta(self):
        return self._metadata

    def _clear_connector_meta(self):
        self._metadata = None

    def register_forward_pass_callable(self):  # noqa: B027
        pass

    @abstractmethod
    def register_kv_caches(self, kv_cache_tensor): ...

    @abstractmethod
    def start_load_kv(self, stream): ...

    @abstractmethod
    def wait_for_layer_load(self, layer_idx, stream): ...

    @abstractmethod
    def save_kv_layer(self, layer_idx, stream): ...

    @abstractmethod
    def wait_for_save(self, stream): ...

    @abstractmethod
    def get_finished(self, finished_gen_req_ids, started_loading_req_ids): ...


class _Scheduler(ABC):
    def __init__(self, llm_args):
        self._llm_args = llm_args
        super().__init__()

    @abstractmethod
    def build_connector_meta(self, scheduler_output): ...

    @abstractmethod
    def get_num_new_matched_tokens(self, request, num_computed_tokens): ...

    @abstractmethod
    def request_finished(self, request, cache_block_ids): ...

    @abstractmethod
    def update_state_after_alloc(self, request, block_ids): ...


if since("main"):

    class KvCacheConnectorWorker(_Worker):
        supports_attention_dp = False

        def register_kv_cache_layout(self, layout):
            tensor = layout.as_single_pool_tensor()
            if tensor is None:
                raise NotImplementedError("this connector wants one pool")
            self.register_kv_caches(tensor)

else:
    KvCacheConnectorWorker = type("KvCacheConnectorWorker", (_Worker,), {})

if since("1.3"):

    class KvCacheConnectorScheduler(_Scheduler):
        def wait_for_initialization(self):
            pass

else:
    KvCacheConnectorScheduler = type("KvCacheConnectorScheduler", (_Scheduler,), {})

if since("main"):

    class KvCacheConnectorScheduler(KvCacheConnectorScheduler):
        supports_attention_dp = False

        def request_finished_by_layer_group(self, request, cache_block_ids_by_layer_group):
            [ids] = cache_block_ids_by_layer_group
            return self.request_finished(request, ids)

        def update_state_after_alloc_by_layer_group(self, request, block_ids_by_layer_group):
            [ids] = block_ids_by_layer_group
            self.update_state_after_alloc(request, ids)
