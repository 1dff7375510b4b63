"""The stand-in does what the library's own tests say that the library does."""

import math
import sys
import types
from pathlib import Path

import pytest

from tests.trtllm.play import FLAVOURS, Gates, standin, until, write_model

BLOCK = 32


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_model(tmp_path / "model"))


class Calls(list):
    """Every call of a connector, in order: name and arguments."""

    def of(self, name):
        return [arguments for called, *arguments in self if called == name]


def connector(monkeypatch, save=False, release=True):
    """A connector module, importable by name, that writes down what it is asked."""
    from backends.tensorrt_llm.probe import connector_api

    api = connector_api()
    calls = Calls()
    module = types.ModuleType("written_down")

    class Scheduler(api.KvCacheConnectorScheduler):
        def build_connector_meta(self, scheduler_output):
            calls.append(("build_connector_meta", scheduler_output))
            return len(calls)

        def get_num_new_matched_tokens(self, request, num_computed_tokens):
            calls.append(("get_num_new_matched_tokens", request, num_computed_tokens))
            return 0, False

        def request_finished(self, request, cache_block_ids):
            calls.append(("request_finished", request, cache_block_ids))
            return save

        def update_state_after_alloc(self, request, block_ids):
            calls.append(("update_state_after_alloc", request, block_ids))

    class Worker(api.KvCacheConnectorWorker):
        def register_kv_caches(self, kv_cache_tensor):
            calls.append(("register_kv_caches", kv_cache_tensor))

        def start_load_kv(self, stream):
            calls.append(("start_load_kv",))

        def wait_for_layer_load(self, layer_idx, stream):
            calls.append(("wait_for_layer_load", layer_idx))

        def save_kv_layer(self, layer_idx, stream):
            calls.append(("save_kv_layer", layer_idx))

        def wait_for_save(self, stream):
            calls.append(("wait_for_save", self.get_connector_meta()))

        def get_finished(self, finished_gen_req_ids, started_loading_req_ids):
            calls.append(("get_finished", list(finished_gen_req_ids)))
            return (finished_gen_req_ids if release else []), []

    module.Scheduler, module.Worker = Scheduler, Worker
    monkeypatch.setitem(sys.modules, "written_down", module)
    return calls


def start(model, **more):
    from tensorrt_llm import LLM
    from tensorrt_llm.llmapi.llm_args import KvCacheConfig, KvCacheConnectorConfig

    cache = more.pop("cache", {})
    settings = {
        "cuda_graph_config": None,
        "skip_tokenizer_init": True,
        "kv_connector_config": KvCacheConnectorConfig(
            connector_module="written_down",
            connector_scheduler_class="Scheduler",
            connector_worker_class="Worker",
        ),
        "kv_cache_config": KvCacheConfig(tokens_per_block=BLOCK, **cache),
    }
    return LLM(model, **{**settings, **more})


def params(tokens, **more):
    from tensorrt_llm import SamplingParams

    return SamplingParams(max_tokens=tokens, end_id=2, **more)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_calls_of_one_request_are_as_many_as_the_library_makes(
    monkeypatch, model, flavour, overlap
) -> None:
    count = 8
    with standin(flavour):
        calls = connector(monkeypatch)
        llm = start(model, disable_overlap_scheduler=not overlap)
        llm.generate([5] * 8, params(count, ignore_eos=True))
        llm.shutdown()
        passes = count + (overlap and flavour == "1.2")  # later ones see the end coming
        if flavour != "1.2":  # there the answer comes before its last turn
            assert len(calls.of("get_finished")) == passes + overlap
        assert len(calls.of("register_kv_caches")) == 1
        for name in ("build_connector_meta", "start_load_kv", "wait_for_save"):
            assert len(calls.of(name)) == passes
        layers = [layer for [layer] in calls.of("save_kv_layer")]
        assert layers == [0, 1, 2] * passes
        assert [it for [it] in calls.of("wait_for_layer_load")] == layers
        assert len(calls.of("get_num_new_matched_tokens")) == 1
        [[_, blocks]] = calls.of("update_state_after_alloc")
        assert len(blocks) == 1
        [[_, blocks]] = calls.of("request_finished")
        assert len(blocks) == 1
        first, *others = [output for [output] in calls.of("build_connector_meta")]
        assert (len(first.new_requests), len(first.cached_requests)) == (1, 0)
        assert all((len(it.new_requests), len(it.cached_requests)) == (0, 1) for it in others)


@pytest.mark.parametrize("v2", [False, True])
def test_chunks_come_with_all_blocks_first_or_with_those_that_each_adds(
    monkeypatch, model, v2
) -> None:
    with standin("main"):
        calls = connector(monkeypatch)
        llm = start(
            model,
            disable_overlap_scheduler=True,
            enable_chunked_prefill=True,
            max_num_tokens=4 * BLOCK,
            cache={"use_kv_cache_manager_v2": v2},
        )
        llm.generate([7] * 8 * BLOCK, params(1))
        llm.shutdown()
        one, two = [output for [output] in calls.of("build_connector_meta")]
        [new], [cached] = one.new_requests, two.cached_requests
        assert (new.computed_position, new.num_scheduled_tokens) == (0, 4 * BLOCK)
        assert (cached.computed_position, cached.num_scheduled_tokens) == (4 * BLOCK, 4 * BLOCK)
        assert len(new.new_tokens) == 8 * BLOCK
        assert cached.new_tokens == []
        assert [len(it.new_block_ids) for it in (new, cached)] == ([4, 4] if v2 else [8, 0])
        [[_, blocks]] = calls.of("request_finished")
        assert len(blocks) == math.ceil((8 * BLOCK + 1) / BLOCK)


def test_reused_blocks_are_listed_and_not_computed(monkeypatch, model) -> None:
    with standin("1.3"):
        calls = connector(monkeypatch)
        llm = start(model, disable_overlap_scheduler=True)
        for _ in range(2):
            llm.generate([7] * 80, params(1))
        llm.shutdown()
        one, two = [output.new_requests[0] for [output] in calls.of("build_connector_meta")]
        assert (two.computed_position, two.num_scheduled_tokens) == (64, 16)
        assert one.new_block_ids[:2] == two.new_block_ids[:2]


def test_an_executor_without_work_asks_nobody_what_was_saved(monkeypatch, model) -> None:
    with standin("1.3"):
        calls = connector(monkeypatch, save=True, release=False)
        llm = start(model, disable_overlap_scheduler=True, cache={"enable_block_reuse": False})
        llm.generate([7] * 40, params(1))
        until(lambda: llm.pinned == 1)
        assert len(calls.of("get_finished")) == 1
        llm.shutdown()


@pytest.mark.parametrize(("flavour", "stays"), [("1.2", False), ("1.3", True)])
def test_of_a_prompt_that_comes_again_the_last_block_stays_only_in_later_releases(
    monkeypatch, model, flavour, stays
) -> None:
    """1.2 pins the block of the older request instead; the next request gets this one."""
    with standin(flavour):
        calls = connector(monkeypatch, save=True, release=False)
        llm = start(model, disable_overlap_scheduler=True)
        for prompt in ([7] * 40, [7] * 40, [8] * 70):
            llm.generate(prompt, params(1))
        until(lambda: llm.pinned == 3)
        llm.shutdown()
        [_, again, other] = [blocks for _, blocks in calls.of("request_finished")]
        assert (again[1] not in other) is stays


@pytest.mark.parametrize(("flavour", "lost"), [("1.2", 2), ("1.3", 0)])
def test_of_several_that_are_released_in_one_turn_1_2_forgets_all_but_one(
    monkeypatch, model, tmp_path, flavour, lost
) -> None:
    gates = Gates(tmp_path / "gates")
    with standin(flavour, gates=str(gates)):
        connector(monkeypatch, save=True)
        llm = start(model, disable_overlap_scheduler=True)
        gates.shut("before_pass")
        llm.generate_async([9], params(1))
        until(lambda: gates.reached("before_pass"))
        results = [llm.generate_async([it] * 40, params(1)) for it in range(2)]
        gates.open("before_pass")
        for result in results:
            result.result()
        until(lambda: llm.pinned == 0 and llm.free_blocks == 4096 // BLOCK - lost)
        llm.shutdown()


@pytest.mark.parametrize(("flavour", "kept"), [("1.2", 192), ("1.3", 64)])
def test_of_a_request_that_is_cancelled_1_2_keeps_what_it_never_computed(
    monkeypatch, model, tmp_path, flavour, kept
) -> None:
    gates = Gates(tmp_path / "gates")
    with standin(flavour, gates=str(gates)):
        calls = connector(monkeypatch)
        llm = start(
            model,
            disable_overlap_scheduler=True,
            enable_chunked_prefill=True,
            max_num_tokens=BLOCK,
        )
        gates.shut("after_chunk")
        gone = llm.generate_async([7] * 200, params(1))
        until(lambda: gates.reached("after_chunk"))
        gone.abort()
        gates.open("after_chunk")
        assert gone.result().outputs[0].finish_reason == "cancelled"
        llm.generate([7] * 200, params(1))
        llm.shutdown()
        [_, [_, reused]] = calls.of("get_num_new_matched_tokens")
        assert reused == kept


def test_the_request_that_a_scheduler_sees_first_has_no_python_half(monkeypatch, model) -> None:
    with standin("1.2"):
        calls = connector(monkeypatch)
        llm = start(model, disable_overlap_scheduler=True)
        llm.generate([7] * 40, params(1))
        llm.shutdown()
        [[early, _]] = calls.of("get_num_new_matched_tokens")
        [[late, _]] = calls.of("request_finished")
        assert not hasattr(early, "py_request_id")
        assert late.py_request_id == late.request_id


def test_only_a_global_id_becomes_the_executors_own(monkeypatch, model) -> None:
    with standin("1.3"):
        calls = connector(monkeypatch)
        llm = start(model, disable_overlap_scheduler=True, max_batch_size=64)
        from tensorrt_llm import DisaggregatedParams

        own = DisaggregatedParams(request_type="context_and_generation", disagg_request_id=1 << 40)
        llm.generate([1], params(1), own)
        llm.generate([1], params(1))
        llm.shutdown()
        ids = [request.request_id for request, _ in calls.of("request_finished")]
        assert ids[0] == 1 << 40
        assert 64 <= ids[1] < 1 << 40


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"pipeline_parallel_size": 2}, NotImplementedError),
        ({"max_beam_width": 2}, NotImplementedError),
        ({"enable_attention_dp": True}, NotImplementedError),
        ({"cache": {"host_cache_size": 1}}, NotImplementedError),
        ({"cache": {"max_attention_window": [16, 32]}}, NotImplementedError),
        ({"no_such_argument": 1}, ValueError),
    ],
)
def test_what_the_library_refuses_as_it_starts_is_refused(monkeypatch, model, wrong, error) -> None:
    with standin("1.3"):
        connector(monkeypatch)
        with pytest.raises(error):
            start(model, **wrong)


def test_requests_that_cannot_be_are_refused_at_once(monkeypatch, model) -> None:
    with standin("1.3"):
        connector(monkeypatch)
        llm = start(model, max_num_tokens=64)
        from tensorrt_llm import DisaggregatedParams, SamplingParams
        from tensorrt_llm.executor.utils import RequestError

        with pytest.raises(ValueError, match="end_id"):
            llm.generate([1], SamplingParams(max_tokens=1))
        with pytest.raises(ValueError, match="max_num_tokens"):
            llm.generate([1] * 65, params(1))
        with pytest.raises(RequestError, match="kv_cache_transceiver is disabled"):
            llm.generate([1], params(1), DisaggregatedParams(request_type="context_only"))
        llm.shutdown()
        with pytest.raises(RuntimeError, match="shutting down"):
            llm.generate([1], params(1))
