"""A rank's export on its own: chunks, leases, late words. On `BATON_TEST_DEVICE`, CPU or CUDA."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from backends.checkpoint.spec import ModelSpec
from backends.errors import BackendMisconfigured
from backends.tensorrt_llm.exporting import Exporter
from backends.tensorrt_llm.geometry import exporting_ranks, heads_of_rank, layout_of, measured
from backends.tensorrt_llm.messages import (
    Arena,
    Close,
    Closed,
    Exported,
    Geometry,
    Message,
    Open,
    Pass,
    Released,
    Step,
    Voided,
)
from tests.support.patience import PATIENCE_SECONDS
from tests.trtllm.play import until
from transfer.shared_memory import allocate, segment_of

DEVICE = os.environ.get("BATON_TEST_DEVICE", "cpu")
BLOCKS, LAYERS, HEADS, SIZE, DIM = 12, 3, 2, 8, 4
ROW = HEADS * SIZE * DIM


class Rank:
    """An exporter, the engine's pool and the arena, both seen as [block, layer, kv, head, ...]."""

    def __init__(self, **more: Any) -> None:
        self.said: list[Message] = []
        self.exporter = Exporter(self.said.append, **more)
        numbers = torch.arange(BLOCKS * LAYERS * 2 * ROW, dtype=torch.int16, device=DEVICE)
        self.pool = numbers.view(torch.float16).view(BLOCKS, LAYERS, 2, ROW)
        self.exporter.register(self.pool.view(torch.uint8), SIZE)
        self.memory = allocate(self.pool.numel() * 2)
        segment = segment_of(self.memory)
        assert segment is not None
        files = [os.dup(segment.fd)]
        self.exporter.heard(Arena(BLOCKS, DIM * 2, segment.offset), files)
        self._passes = 0

    def step(self, start: int, end: int, *blocks: int, request: int = 7) -> None:
        self._passes += 1
        event: Any = None
        if DEVICE == "cuda":
            event = torch.cuda.Event()
            event.record()
        self.exporter.after_pass(event, Pass(self._passes, (Step(request, start, end, blocks),)))

    def seen(self, block: int) -> Any:
        shape = (BLOCKS, LAYERS, 2, HEADS, SIZE, DIM)
        return self.memory.view("u2").reshape(shape)[block]

    def held(self, block: int) -> Any:
        cut = self.pool[block].view(torch.int16).cpu().numpy().view("u2")
        return cut.reshape(LAYERS, 2, HEADS, SIZE, DIM)

    def heard(self, message: Message) -> None:
        until(lambda: message in self.said)


@pytest.fixture
def rank() -> Rank:
    return Rank()


def test_blocks_and_parts_of_blocks_are_copied_and_nothing_else(rank: Rank) -> None:
    rank.exporter.heard(Open(7, 19, (4, 2, 9), 60.0), [])
    rank.step(0, 5, 11)
    rank.step(5, 19, 11, 3, 0)
    rank.heard(Exported(7, 19))
    assert (rank.seen(4) == rank.held(11)).all()
    assert (rank.seen(2) == rank.held(3)).all()
    assert (rank.seen(9)[..., :3, :] == rank.held(0)[..., :3, :]).all()
    assert not rank.seen(9)[..., 3:, :].any()
    assert not any(rank.seen(block).any() for block in range(BLOCKS) if block not in (4, 2, 9))


def test_what_is_final_before_its_request_is_known_waits_for_it(rank: Rank) -> None:
    rank.step(0, 8, 1)
    rank.step(8, 9, 2)
    assert rank.exporter.finished([7]) == []
    rank.exporter.heard(Open(7, 9, (0, 1), 60.0), [])
    rank.heard(Exported(7, 9))
    assert rank.said == [Exported(7, 8), Exported(7, 9)]
    assert (rank.seen(0) == rank.held(1)).all()
    assert rank.exporter.finished([]) == [7]
    assert rank.exporter.finished([]) == []


def test_a_pass_that_stays_bound_is_exported_once(rank: Rank) -> None:
    """A pass without news leaves the last one's metadata in place."""
    rank.exporter.heard(Open(7, 16, (0, 1), 60.0), [])
    told = Pass(1, (Step(7, 0, 8, (3,)),))
    rank.exporter.after_pass(None, told)
    rank.heard(Exported(7, 8))
    before = rank.held(3).copy()
    rank.pool[3] = 0
    rank.exporter.after_pass(None, told)
    rank.exporter.after_pass(None, Pass(2, (Step(7, 8, 16, (4,)),)))
    rank.heard(Exported(7, 16))
    assert (rank.seen(0) == before).all()


def test_blocks_that_were_given_back_are_not_exported(rank: Rank) -> None:
    """The request finished, and nobody spoke of it until the engine had its blocks again."""
    assert rank.exporter.finished([7]) == [7]
    rank.exporter.heard(Open(7, 8, (0,), 60.0), [])
    rank.step(0, 8, 1)
    assert [type(it) for it in rank.said] == [Released, Voided]
    assert rank.exporter.finished([]) == []
    rank.exporter.heard(Close(7), [])
    rank.heard(Closed(7))
    assert not rank.memory.any()


def test_a_lease_runs_out_by_itself(rank: Rank) -> None:
    """A request that is never exported to its end would pin its blocks for ever."""
    rank.exporter.heard(Open(7, 16, (0, 1), 0.05), [])
    rank.step(0, 8, 1)
    rank.heard(Exported(7, 8))
    assert rank.exporter.finished([7]) == []
    until(lambda: rank.exporter.finished([]) == [7])
    assert Voided(7, "the lease on its blocks ran out") in rank.said
    rank.step(8, 16, 2)
    rank.exporter.heard(Open(8, 8, (2,), 60.0), [])
    rank.step(0, 8, 3, request=8)
    rank.heard(Exported(8, 8))
    assert Exported(7, 16) not in rank.said
    assert not rank.seen(1).any()


class Held:
    """A point that the device has not reached."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.waited_for = threading.Event()

    def synchronize(self) -> None:
        self.waited_for.set()
        assert self.reached.wait(10)


def test_what_another_request_writes_to_before_it_was_copied_is_lost() -> None:
    """Being copied, waiting for that, or not yet asked for; others are left alone."""
    rank = Rank(patience_seconds=0.05)
    for request, arena in ((7, 0), (8, 1), (9, 2)):
        rank.exporter.heard(Open(request, 8, (arena,), 60.0), [])
    device = Held()
    steps = tuple(Step(request, 0, 8, (request,)) for request in (7, 8, 9, 10))
    rank.exporter.after_pass(device, Pass(1, steps))
    assert device.waited_for.wait(10)
    rank.exporter.before_pass(Pass(2, (), (1, 7, 8, 10)))
    device.reached.set()
    rank.heard(Exported(9, 8))
    rank.exporter.heard(Open(10, 8, (3,), 60.0), [])
    lost = [it.request for it in rank.said if isinstance(it, Voided)]
    assert lost == [7, 8, 10]
    assert [it for it in rank.said if isinstance(it, Exported)] == [Exported(9, 8)]
    assert rank.exporter.finished([7, 8, 9, 10]) == [7, 8, 9, 10]


def test_the_executor_waits_for_what_it_would_write_over_and_for_nothing_else(rank: Rank) -> None:
    rank.exporter.heard(Open(7, 8, (0,), 60.0), [])
    device = Held()
    rank.exporter.after_pass(device, Pass(1, (Step(7, 0, 8, (3,)),)))
    rank.exporter.before_pass(Pass(2, (), (4,)))
    assert rank.said == []
    threading.Timer(0.01, device.reached.set).start()
    rank.exporter.before_pass(Pass(2, (), (3,)))
    assert (rank.seen(0) == rank.held(3)).all()
    rank.heard(Exported(7, 8))
    assert rank.said == [Exported(7, 8)]


def test_the_executor_waits_for_nothing_that_this_rank_exports_nowhere() -> None:
    """It learns only while it waits that another rank has these heads."""
    rank = Rank(patience_seconds=600.0)
    rank.step(0, 8, 3)
    overwrites = Pass(2, (), (3,))
    executor = threading.Thread(target=rank.exporter.before_pass, args=(overwrites,), daemon=True)
    executor.start()
    executor.join(0.05)
    assert executor.is_alive()
    rank.exporter.heard(Open(7, 8, (), 60.0), [])
    executor.join(20)
    assert not executor.is_alive()
    assert rank.said == []


def test_one_request_is_released_in_a_turn_where_the_library_loses_others() -> None:
    rank = Rank(one_at_a_time=True)
    for request in (7, 8, 9):
        rank.exporter.heard(Open(request, 8, (request,), 60.0), [])
    rank.step(0, 8, 1, request=8)
    rank.step(0, 8, 2, request=9)
    rank.heard(Exported(9, 8))
    assert rank.exporter.finished([9, 7]) == []
    assert rank.exporter.finished([8]) == []
    rank.step(0, 8, 3, request=7)
    rank.heard(Exported(7, 8))
    assert [rank.exporter.finished([]) for _ in range(4)] == [[7], [9], [8], []]


def test_after_close_nothing_is_written_any_more(rank: Rank) -> None:
    rank.exporter.heard(Open(7, 16, (0, 1), 60.0), [])
    rank.exporter.heard(Close(7), [])
    rank.heard(Closed(7))
    rank.step(0, 16, 1, 2)
    rank.exporter.heard(Open(8, 8, (2,), 60.0), [])
    rank.step(0, 8, 3, request=8)
    rank.heard(Exported(8, 8))
    assert not rank.seen(0).any()
    assert rank.exporter.finished([7]) == [7]


def test_without_the_worker_nothing_stays_pinned(rank: Rank) -> None:
    rank.exporter.heard(Open(7, 16, (0, 1), 60.0), [])
    rank.step(0, 8, 3, request=9)
    assert rank.exporter.finished([7, 9]) == []
    rank.exporter.heard(None, [])
    assert sorted(rank.exporter.finished([])) == [7, 9]


def test_blocks_that_there_are_not_fail_their_request_alone(rank: Rank) -> None:
    rank.exporter.heard(Open(7, 8, (0,), 60.0), [])
    rank.exporter.heard(Open(8, 8, (1,), 60.0), [])
    rank.step(0, 8, BLOCKS + 5)
    rank.step(0, 8, 3, request=8)
    rank.heard(Exported(8, 8))
    assert [it.request for it in rank.said if isinstance(it, Voided)] == [7]


# ---- what a rank has registered


class Arguments:
    """`llm_args`, as far as they are looked at."""

    attn_backend = "TRTLLM"

    def __init__(self, dtype: str = "auto") -> None:
        self.kv_cache_config = type("", (), {"tokens_per_block": SIZE, "dtype": dtype})
        mapping = type("", (), {"rank": 0, "world_size": 1})
        self.parallel_config = type("", (), {"to_mapping": lambda _self: mapping})()


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.zeros(4, 2, 1, ROW), r"latents \(MLA\) are not exported"),
        (torch.zeros(4, 2, 2, ROW, dtype=torch.int8), r"packed \(nvfp4\)"),
        (torch.zeros(4, 2, 2, ROW, dtype=torch.uint8), "is of uint8"),
        (torch.zeros(4, 2, 2, ROW, dtype=torch.float64), "is of float64"),
        (torch.zeros(4, 2, 2, HEADS, SIZE * DIM), "one contiguous tensor"),
        (torch.zeros(2, 4, 2, ROW).transpose(0, 1), "one contiguous tensor"),
    ],
)
def test_a_pool_of_unknown_shape_is_refused_with_the_reason(tensor: Any, why: str) -> None:
    with pytest.raises(BackendMisconfigured, match=why):
        measured(tensor, Arguments())


def test_a_float8_pool_is_known_by_its_configuration_where_its_dtype_is_raw() -> None:
    raw = torch.zeros(4, 2, 2, ROW, dtype=torch.uint8)
    assert measured(raw, Arguments("fp8")).dtype == "float8_e4m3fn"


def spec(**more: Any) -> ModelSpec:
    shape: dict[str, Any] = {
        "family": "llama",
        "layers": LAYERS,
        "hidden": 16,
        "heads": 4,
        "kv_heads": HEADS,
        "head_dim": DIM,
        "feed_forward": 8,
        "vocabulary": 100,
        "context_tokens": 100,
        "norm_epsilon": 1e-5,
        "rope_theta": 1e4,
        "rope_scaling": None,
        "pairing": "half",
        "end_tokens": (2,),
        "tied": False,
    }
    return ModelSpec(**{**shape, **more})


def geometry(rank: int = 0, world: int = 1, row: int = ROW, **more: Any) -> Geometry:
    shape = more.pop("shape", (BLOCKS, LAYERS, 2, row))
    dtype, attention = more.pop("dtype", "float16"), more.pop("attention", "TRTLLM")
    return Geometry(rank, world, shape, dtype, SIZE, attention)


@pytest.mark.parametrize(
    ("ranks", "why"),
    [
        ([geometry(shape=(BLOCKS, 5, 2, ROW))], "has 5 layers, config.json says 3"),
        ([geometry(row=ROW * 2)], "128 numbers .* 2 heads of 4 for 8 tokens are 64"),
        ([geometry(attention="FLASHINFER")], "attn_backend is FLASHINFER"),
        ([geometry(0, 2)], "1 of 2 ranks"),
        ([geometry(0, 2, ROW // 2), geometry(1, 2, ROW // 2, dtype="float32")], "ranks differ"),
        ([geometry(0, 2, ROW // 2), geometry(1, 2, ROW)], "ranks differ"),
        ([geometry(it, 3) for it in range(3)], "cannot be shared out to 3 ranks"),
    ],
)
def test_tensors_and_model_that_contradict_each_other_are_refused(
    ranks: list[Geometry], why: str
) -> None:
    with pytest.raises(BackendMisconfigured, match=why):
        layout_of(ranks, spec(), model="m", weights="w")


def test_fewer_heads_than_ranks_have_replicas_of_which_one_exports() -> None:
    assert [heads_of_rank(rank, 8, 2).first for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert exporting_ranks(8, 2) == (0, 4)
    assert exporting_ranks(2, 8) == (0, 1)


# ---- the socket between worker and ranks


@contextmanager
def desk() -> Iterator[Any]:
    from backends.tensorrt_llm.background import Background
    from backends.tensorrt_llm.desk import Desk

    told: list[Any] = []
    background = Background(told.append)
    made = Desk(lambda: None, lambda *it: told.append(it), lambda *it: told.append(it))
    background.spawn(made.serve)
    try:
        yield made, told
    finally:
        background.close()
        made.close()


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x00",
        b"\x00\x00\x00\x03abc",
        b"\x00\x00\x00\x05\x91\x91\x91\x91\x91",
        b"\x00\x10",
    ],
)
def test_garbage_on_the_socket_costs_its_sender_the_connection_and_nobody_else(
    garbage: bytes,
) -> None:
    from backends.tensorrt_llm.messages import frame

    with desk() as (made, told):
        good, bad = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        with good, bad:
            good.connect(made.path)
            good.sendall(frame(geometry()))
            until(lambda: made.ranks == (0,))
            bad.connect(made.path)
            bad.sendall(garbage)
            bad.shutdown(socket.SHUT_WR)
            bad.settimeout(PATIENCE_SECONDS)
            assert bad.recv(1) == b""
            good.sendall(frame(Exported(1, 2)))
            until(lambda: told == [(0, Exported(1, 2))])


def test_a_rank_that_comes_twice_is_turned_away(rank: Rank) -> None:
    from backends.tensorrt_llm.messages import frame

    with desk() as (made, told):
        one, two = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        with one, two:
            one.connect(made.path)
            one.sendall(frame(geometry()))
            until(lambda: made.ranks == (0,))
            two.connect(made.path)
            two.sendall(frame(geometry()))
            two.settimeout(PATIENCE_SECONDS)
            assert two.recv(1) == b""
            assert (made.ranks, told) == ((0,), [])
            one.close()
            until(lambda: told and told[0][0] == 0)


@pytest.mark.parametrize(("worker", "status"), [("1", os.EX_SOFTWARE), ("os.getpid()", 0)])
def test_a_rank_ends_when_its_worker_is_gone_and_is_another_process(
    worker: str, status: int
) -> None:
    code = (
        "import os, threading; from backends.tensorrt_llm.leash import end_without;"
        f"end_without({worker}, 0.01); threading.Event().wait(60 if {status} else 0.1)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], timeout=50, check=False).returncode == status
    )
