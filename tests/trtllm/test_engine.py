"""The engine on the stand-in: what leaves it is right, and nothing of it is left behind."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from backends.api import PrefillJob
from backends.errors import BackendError, BackendMisconfigured
from backends.tensorrt_llm.scheduling import TURN_TOKENS, digest_of
from tests.trtllm.desk import Desk, desk, wrong
from tests.trtllm.play import FLAVOURS, until

LONG = list(range(5, 205))


def params(it: Desk) -> Any:
    """As they are asked for by somebody else who has the engine."""
    return it.engine._library._module.SamplingParams(max_tokens=1, end_id=-1)


def submitted(it: Desk, tokens: list[int]) -> PrefillJob:
    """A job that the engine has been asked for."""
    job = it.job(tokens)
    carried = it.engine._carrier._jobs
    until(lambda: job.name in carried and carried[job.name].results)
    return job


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_number_of_a_prompt_arrives_chunk_by_chunk(tmp_path: Path, flavour: str) -> None:
    with desk(tmp_path, flavour) as it:
        job = it.done(LONG)
        ready = [(start, end) for kind, start, end in it.heard.of(job.name)[:-2]]
        assert ready == [(0, 64), (64, 128), (128, 192), (192, 200)]
        it.free()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_chunks_that_end_within_a_block_are_put_together(tmp_path: Path, dtype: str) -> None:
    with desk(tmp_path, chunk_tokens=23, dtype=dtype) as it:
        for length in (1, 2, 15, 16, 17, 46, 47, 100):
            it.done(list(range(9, 9 + length)))
        it.free()


def test_nothing_behind_the_prompt_is_written_to_the_arena(tmp_path: Path) -> None:
    """Not even into the rest of its last block: the engine has other requests' bytes there."""
    with desk(tmp_path) as it:
        layout = it.engine.info.layout
        it.engine.pool[:] = 0x5A
        job = it.done(LONG[:20])
        shape = tuple(layout.sizes(it.engine.info.pool_blocks).values())
        blocks = it.engine.pool.view("u2").reshape(shape)
        assert (blocks[job.blocks[1], :, :, :, 4:] == 0x5A5A).all()
        others = [block for block in range(shape[0]) if block not in job.blocks]
        assert (blocks[others] == 0x5A5A).all()


@pytest.mark.parametrize("manager", [False, True])
def test_both_managers_of_blocks_tell_of_them(tmp_path: Path, manager: bool) -> None:
    """The second one names the blocks of a chunk with it, the first one all of them before."""
    cache = {"max_tokens": 2048, "use_kv_cache_manager_v2": manager}
    with desk(tmp_path, "main", kv_cache=cache) as it:
        it.done(LONG)
        it.done(LONG[:70])
        it.free()


def test_a_beginning_that_the_engine_had_already_is_exported_too(tmp_path: Path) -> None:
    with desk(tmp_path) as it:
        it.done(LONG)
        again = it.done([*LONG[:100], *LONG])
        [cached] = [rest[1] for kind, *rest in it.heard.of(again.name) if kind == "prefilled"]
        assert cached == 96
        it.free()


@pytest.mark.parametrize(("salts", "shared"), [((b"a", b"b"), False), ((b"", b""), False)])
def test_nothing_is_shared_between_salts_or_without_one(
    tmp_path: Path, salts: tuple[bytes, bytes], shared: bool
) -> None:
    with desk(tmp_path) as it:
        jobs = [it.done(LONG, salt=salt) for salt in salts]
        found = [rest[1] for kind, *rest in it.heard.of(jobs[1].name) if kind == "prefilled"]
        assert (found != [0]) is shared


@pytest.mark.parametrize("flavour", ["1.2", "1.3"])
def test_many_at_once_are_all_right(tmp_path: Path, flavour: str) -> None:
    with desk(tmp_path, flavour, max_batch=4) as it:
        prompts = [[*range(start, start + 30 + 7 * start)] for start in range(1, 20)]
        jobs = [it.job(prompt, n=1 + start % 3) for start, prompt in enumerate(prompts)]
        it.ended(*jobs)
        for job, prompt in zip(jobs, prompts, strict=True):
            assert it.heard.kinds(job.name)[-2:] == ["prefilled", "ended"]
            assert wrong(it.engine, prompt, job.blocks) is None
            [sampled] = [rest[0] for kind, *rest in it.heard.of(job.name) if kind == "prefilled"]
            assert len(sampled) == len(job.sequences)
        it.free()


def test_with_its_overlap_scheduler_the_engine_runs_on_and_nothing_of_that_is_exported(
    tmp_path: Path,
) -> None:
    with desk(tmp_path, llm={"disable_overlap_scheduler": False}) as it:
        for length in (16, 31, 100):
            it.done(list(range(length)))
        it.free()


def test_the_answer_alone_ends_no_job(tmp_path: Path) -> None:
    """KV is committed when the scheduler was told of the end, however early the answer is."""
    with desk(tmp_path, knobs={"respond": "before"}) as it:
        it.gates.shut("answered")
        job = it.job(LONG)
        it.answered(job)
        until(lambda: it.heard.of(job.name)[-1:] == [("ready", 192, 200)])
        it.settle()
        assert "prefilled" not in it.heard.kinds(job.name)
        until(lambda: it.engine.pins() == {job.name: 13})
        it.gates.open("answered")
        it.ended(job)
        assert wrong(it.engine, LONG, job.blocks) is None
        it.free()


def test_an_aborted_job_has_ended_when_the_engine_has_let_go_of_its_memory(tmp_path: Path) -> None:
    """Not when its answer is there: the library may yet tell the connector of it, or not."""
    with desk(tmp_path, knobs={"respond": "before"}) as it:
        for gate in ("after_chunk", "answered"):
            it.gates.shut(gate)
        job = it.job(LONG)
        until(lambda: it.gates.reached("after_chunk"))
        it.engine.abort(job.name)
        it.gates.open("after_chunk")
        it.answered(job)
        it.settle()
        assert "ended" not in it.heard.kinds(job.name)
        it.gates.open("answered")
        it.ended(job)
        it.free()


def test_a_job_is_not_waited_for_without_end_once_it_is_answered(tmp_path: Path) -> None:
    with desk(tmp_path, knobs={"respond": "before"}, lease_seconds=0.2) as it:
        it.gates.shut("answered")
        job = it.job(LONG)
        until(lambda: "failed" in it.heard.kinds(job.name))
        it.gates.open("answered")
        it.ended(job)
        assert "0.2 s after its answer" in it.heard.of(job.name)[-2][1]
        it.free()


def test_an_end_token_right_after_the_prompt_is_a_token_like_any_other(tmp_path: Path) -> None:
    with desk(tmp_path, knobs={"first_is_end": True}) as it:
        job = it.done(LONG)
        assert it.heard.of(job.name)[-2] == ("prefilled", [2], 0)
        it.free()


def test_a_bound_token_is_not_sampled_and_without_blocks_nothing_is_exported(
    tmp_path: Path,
) -> None:
    with desk(tmp_path) as it:
        bound = it.job(LONG, n=0)
        it.ended(bound)
        assert it.heard.of(bound.name)[-2] == ("prefilled", [], 0)
        assert wrong(it.engine, LONG, bound.blocks) is None
        it.free()


# ---- aborts

STAGES = {"waiting": "before_pass", "mid-prefill": "after_chunk", "answered": "before_finish"}


@pytest.mark.parametrize("cancel", ["hook", "recycle"])
@pytest.mark.parametrize("stage", [*STAGES, "pinned"])
def test_an_abort_at_any_stage_frees_everything_and_harms_no_other(
    tmp_path: Path, stage: str, cancel: str
) -> None:
    """Whether or not the library tells the connector of a request that was cancelled."""
    with desk(tmp_path, knobs={"cancel": cancel}, max_batch=1) as it:
        gate = STAGES.get(stage, stage)
        it.gates.shut(gate)
        ahead = it.job(LONG[:150]) if stage == "waiting" else None
        job = it.job(LONG)
        until(lambda: it.gates.reached(gate))
        it.engine.abort(job.name)
        it.engine.abort("nobody")
        other = it.job(LONG[3:])
        it.gates.open(gate)
        it.ended(job, other)
        for one, tokens in ((ahead, LONG[:150]), (other, LONG[3:])):
            if one is not None:
                it.ended(one)
                assert it.heard.kinds(one.name)[-2:] == ["prefilled", "ended"]
                assert wrong(it.engine, tokens, one.blocks) is None
        it.engine.abort(job.name)
        it.done(LONG[5:])
        assert it.heard.ends[job.name] == 1
        it.free()


def test_an_abort_right_behind_a_job_is_not_lost(tmp_path: Path) -> None:
    with desk(tmp_path) as it:
        jobs = [it.job(LONG[:40]) for _ in range(20)]
        for job in jobs:
            it.engine.abort(job.name)
        it.ended(*jobs)
        it.free()


def test_a_job_that_is_aborted_behind_a_full_batch_ends_though_the_engine_says_nothing(
    tmp_path: Path,
) -> None:
    with desk(tmp_path, max_batch=1) as it:
        it.gates.shut("after_chunk")
        ahead = submitted(it, LONG)
        until(lambda: it.gates.reached("after_chunk"))
        job = submitted(it, LONG[5:])
        [result] = it.engine._carrier._jobs[job.name].results
        it.engine.abort(job.name)
        until(result.aborted)
        it.gates.open("after_chunk")
        it.ended(ahead, job)
        assert it.heard.kinds(ahead.name)[-2:] == ["prefilled", "ended"]
        assert it.heard.kinds(job.name) == ["ended"]
        it.done(LONG[5:])
        it.free()


def test_what_an_aborted_job_left_uncomputed_is_not_reused(tmp_path: Path) -> None:
    """The oldest release keeps all blocks of a cancelled prompt, which is then not cancelled."""
    for flavour in FLAVOURS:
        with desk(tmp_path / flavour, flavour) as it:
            it.gates.shut("after_chunk")
            job = submitted(it, LONG)
            until(lambda: it.gates.reached("after_chunk"))
            it.engine.abort(job.name)
            it.gates.open("after_chunk")
            it.ended(job)
            assert "prefilled" not in it.heard.kinds(job.name)
            it.done(LONG)
            it.free()


# ---- what goes wrong


def test_a_job_whose_blocks_were_another_prompts_before_they_were_copied_fails(
    tmp_path: Path,
) -> None:
    """The oldest release pins the blocks of an older request with the same tokens instead."""
    with desk(tmp_path, "1.2", lacks="disagg_request_id", max_batch=1) as it:
        it.done(LONG[:40])
        it.gates.shut("before_pass")
        ahead = it.job(LONG[100:110])
        until(lambda: it.gates.reached("before_pass"))
        job = submitted(it, LONG[:40])
        deaf = threading.Event()
        it.engine._background.post(deaf.wait, 10)  # nobody says where its KV is to go
        it.gates.open("before_pass")
        it.llm.generate(LONG[50:], params(it))
        deaf.set()
        it.ended(ahead, job)
        assert it.heard.kinds(ahead.name)[-2:] == ["prefilled", "ended"]
        [(_, why), _] = it.heard.of(job.name)
        assert "before it was known" in why
        it.done(LONG[:40])
        it.free()


def test_a_job_whose_blocks_the_engine_has_given_away_fails_alone(tmp_path: Path) -> None:
    with desk(tmp_path, knobs={"hole": True}) as it:
        job = it.job(LONG)
        one_block = it.done(LONG[:10])
        it.ended(job)
        [(_, why)] = [one for one in it.heard.of(job.name) if one[0] == "failed"]
        assert "no block for some of 0 to 64" in why
        assert "prefilled" not in it.heard.kinds(job.name)
        assert it.heard.kinds(one_block.name)[-1] == "ended"
        it.free()


def test_a_request_that_the_engine_refuses_fails_alone(tmp_path: Path) -> None:
    with desk(tmp_path, context_tokens=100) as it:
        job = it.job(LONG)
        it.ended(job)
        assert "max_seq_len" in it.heard.of(job.name)[0][1]
        it.done(LONG[:100])
        it.free()


def test_a_callback_that_raises_is_the_engines_death_and_is_told(tmp_path: Path) -> None:
    with desk(tmp_path) as it:
        it.gates.shut("before_pass")
        it.job(LONG)
        until(lambda: it.gates.reached("before_pass"))
        (tmp_path / "gates" / "before_pass.raise").touch()
        it.gates.open("before_pass")
        until(lambda: it.heard.dead)
        with pytest.raises(BackendError, match="the engine is dead"):
            it.job(LONG)


def test_what_only_a_decode_engine_could_do_is_refused(tmp_path: Path) -> None:
    with desk(tmp_path) as it:
        with pytest.raises(BackendError, match="only prefills"):
            it.engine.decode(it.done(LONG))
        with pytest.raises(BackendError, match="prompt_logprobs"):
            it.job(LONG, prompt_logprobs=0)


# ---- without what newer releases have


def test_without_ids_of_our_own_requests_are_known_by_their_prompt(tmp_path: Path) -> None:
    with desk(tmp_path, "1.2", lacks="disagg_request_id", max_batch=3) as it:
        prompts = [LONG[:50], LONG, LONG[:50], LONG[7:80], LONG]
        jobs = [it.job(prompt, n=2) for prompt in prompts]
        it.engine.abort(jobs[3].name)
        it.ended(*jobs)
        for job, prompt in zip(jobs, prompts, strict=True):
            if job is not jobs[3]:
                assert it.heard.kinds(job.name)[-2:] == ["prefilled", "ended"]
                assert wrong(it.engine, prompt, job.blocks) is None
        it.done(LONG[7:80])
        it.free()
        assert not it.engine._carrier._unmatched
        ours = it.job([0, 0, 0])
        it.ended(ours)
        assert it.heard.kinds(ours.name) == ["failed", "ended"]


def test_a_request_that_is_taken_for_a_cancelled_jobs_is_not_exported_to_its_blocks(
    tmp_path: Path,
) -> None:
    """The cancelled job waits for a turn, in which another one with its prompt is begun."""
    with desk(tmp_path, lacks="disagg_request_id", max_batch=1) as it:
        carrier = it.engine._carrier
        it.engine.pool[:] = 0x5A
        it.gates.shut("after_chunk")
        submitted(it, LONG[9:189])
        until(lambda: it.gates.reached("after_chunk"))
        gone = submitted(it, LONG)
        it.engine.abort(gone.name)
        until(lambda: digest_of(TURN_TOKENS) in carrier._unmatched)
        other = submitted(it, LONG)
        it.gates.open("after_chunk")
        it.ended(gone, other)
        pool = it.engine.pool.reshape(it.engine.info.pool_blocks, -1)
        assert (pool[list(gone.blocks)] == 0x5A).all()
        assert it.heard.kinds(gone.name) == ["ended"]
        [(_, why), _] = it.heard.of(other.name)
        assert "taken for that of a cancelled job" in why
        it.done(LONG)
        it.free()
        assert not carrier._unmatched


def test_a_release_that_does_not_tell_what_it_computes_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(BackendMisconfigured, match="does not tell connectors num_scheduled_tokens"),
        desk(tmp_path, "1.2", lacks="num_scheduled_tokens"),
    ):
        pass


# ---- ranks in processes of their own


def shards(it: Desk) -> list[tuple[int, int]]:
    return [(one.first, one.count) for one in it.engine.info.shards]


def test_every_rank_exports_its_own_heads_and_of_replicas_one(tmp_path: Path) -> None:
    """Two heads on four ranks; the one that exports the second head is slow."""
    knobs = {"slow_rank": 2}
    with desk(tmp_path, processes=True, tensor_parallel=4, knobs=knobs) as it:
        assert shards(it) == [(0, 1), (1, 1)]
        it.done(LONG)
        it.done(LONG)
        it.free()


@pytest.mark.parametrize("flavour", ["1.2", "1.3"])
def test_a_rank_that_is_killed_is_the_engines_death(tmp_path: Path, flavour: str) -> None:
    """Of which the oldest release says nothing: its answers never come."""
    with desk(tmp_path, flavour, processes=True, tensor_parallel=2) as it:
        it.done(LONG[:20])
        it.gates.shut("pinned")
        it.job(LONG)
        until(lambda: it.gates.reached("pinned"))
        os.kill(it.llm.ranks[1].pid, signal.SIGKILL)
        until(lambda: it.heard.dead)
        assert "rank" in it.heard.dead


def test_ranks_that_are_left_alone_end(tmp_path: Path) -> None:
    with desk(tmp_path, processes=True) as it:
        ranks = it.llm.ranks
    until(lambda: not any(rank.is_alive() for rank in ranks))


def test_what_is_foreseen_of_it_is_what_it_has(tmp_path: Path) -> None:
    from backends.foreseen import foresee

    with desk(tmp_path, processes=True, tensor_parallel=2) as it:
        options = {"tensor_parallel": 2, "block_tokens": 16, "identity": "standin"}
        seen = foresee("tensorrt_llm", options, str(tmp_path / "model"))
        assert seen.layout(seen, "standin") == it.engine.info.layout
        assert seen.pools == len(it.engine.info.shards)


# ---- what is refused as it starts


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"llm": {"pipeline_parallel_size": 2}}, "llm.pipeline_parallel_size: KV is exported"),
        ({"llm": {"enable_attention_dp": True}}, "llm.enable_attention_dp: KV is exported"),
        ({"llm": {"no_such": 1}}, "no_such"),
        ({"llm": {"attn_backend": "FLASHINFER"}}, "llm.attn_backend is set by this backend"),
        ({"kv_cache": {"host_cache_size": 1 << 30}}, "kv_cache.host_cache_size: KV is exported"),
        ({"kv_cache": {"dtype": "fp8"}}, "kv_cache.dtype is set by this backend"),
        ({"identity": ""}, "identity: say how other workers call this model"),
        ({"block_tokens": 0}, "block_tokens"),
        ({"context_tokens": 8192}, "the model was made for 4096"),
        ({"model": {"model_type": "gpt2"}}, "model_type is 'gpt2'"),
    ],
)
def test_what_cannot_work_says_so_as_it_starts(
    tmp_path: Path, options: dict[str, Any], why: str
) -> None:
    with pytest.raises(BackendMisconfigured, match=why), desk(tmp_path, **options):
        pass


def test_layers_in_pools_of_their_own_are_refused(tmp_path: Path) -> None:
    cache = {"max_tokens": 2048, "use_kv_cache_manager_v2": True}
    knobs = {"separate_pools": True}
    with (
        pytest.raises(BackendMisconfigured, match="one pool"),
        desk(tmp_path, "main", kv_cache=cache, knobs=knobs),
    ):
        pass


def test_without_the_library_its_own_error_comes_out(tmp_path: Path) -> None:
    from backends.tensorrt_llm.engine import TensorRTLLM
    from tests.trtllm.play import write_model

    with pytest.raises(ModuleNotFoundError, match="tensorrt_llm"):
        TensorRTLLM(model=str(write_model(tmp_path)))
