"""Messages between a worker and its engine process, and requests in vLLM's words."""

import socket
from types import SimpleNamespace

import pytest

from backends.api import DecodeJob, Logprob, Output, PrefillJob, Sampled, Sampling, Sequence
from backends.errors import BackendError, BackendMisconfigured
from backends.vllm import VllmBackend
from backends.vllm.messages import (
    Abort,
    Decoded,
    FromEngine,
    Inbox,
    Prefilled,
    Ready,
    TakeDecode,
    TakePrefill,
    ToEngine,
    frame,
)
from backends.vllm.options import read_options
from backends.vllm.sampling import HONOURED, logprob, parameters, sampled


def sequence(generated=(), seed=5, **wishes) -> Sequence:
    return Sequence(
        prompt=[7, 8], generated=list(generated), sampling=Sampling(**wishes), seed=seed
    )


@pytest.fixture
def ends():
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def test_jobs_arrive_as_they_were_sent_however_the_bytes_are_cut(ends) -> None:
    ours, theirs = ends
    inbox: Inbox[ToEngine] = Inbox(theirs, ToEngine)
    prefill = PrefillJob(
        name="a", salt=b"\x00s", tokens=[7, 8], blocks=(3, 4), sequences=(sequence(),)
    )
    decode = DecodeJob(name="b", sequence=sequence([9], logprobs=2), max_tokens=4, blocks=(3,))
    sent = [TakePrefill(prefill), TakeDecode(decode), Abort("a")]
    found: list[ToEngine] = []
    for byte in b"".join(map(frame, sent)):
        ours.sendall(bytes([byte]))
        found += inbox.read()
    assert list(map(frame, found)) == list(map(frame, sent))
    assert found[0].job.salt == b"\x00s"
    assert found[1].job.imported_tokens == 2


def test_events_arrive_as_they_were_sent(ends) -> None:
    ours, theirs = ends
    inbox: Inbox[FromEngine] = Inbox(ours, FromEngine)
    sent = [
        Ready("a", 0, 32, None),
        Prefilled("a", Output((Sampled(9, Logprob(9, -0.5, ((9, -0.5),))),)), 16),
        Decoded((("b", Sampled(1)), ("c", Sampled(2)))),
    ]
    theirs.sendall(b"".join(map(frame, sent)))
    assert inbox.read() == sent


def test_the_end_of_the_other_process_is_noticed(ends) -> None:
    ours, theirs = ends
    theirs.close()
    with pytest.raises(EOFError):
        Inbox(ours, FromEngine).read()


@pytest.mark.parametrize("bytes_", [b"\xff\xff\xff\xff", b"\x01\x00\x00\x00\xc1"])
def test_what_is_no_message_is_refused_before_memory_is_taken(ends, bytes_) -> None:
    ours, theirs = ends
    theirs.sendall(bytes_)
    with pytest.raises(BackendError, match=r"frame of 4294967295 bytes|unreadable"):
        Inbox(ours, FromEngine).read()


def test_everything_that_may_end_a_sequence_is_a_stop_token_of_vllms() -> None:
    wishes = parameters(sequence([1, 2], stop_token_ids=(44,), min_tokens=5), (2, 3), 10, None)
    assert wishes["stop_token_ids"] == [2, 3, 44]
    assert wishes["min_tokens"] == 3
    assert wishes["max_tokens"] == 10
    assert wishes["seed"] == 5
    wishes = parameters(sequence(stop_token_ids=(44,), ignore_eos=True), (2, 3), 10, None)
    assert wishes["stop_token_ids"] == [44]
    wishes = parameters(sequence(ignore_eos=True, min_tokens=5), (2, 3), 10, None)
    assert (wishes["stop_token_ids"], wishes["min_tokens"]) == ([], 0)


def test_what_looks_at_generated_tokens_alone_is_not_honoured() -> None:
    assert not HONOURED & {"presence_penalty", "frequency_penalty"}
    assert set(Sampling.__struct_fields__) - HONOURED == {"presence_penalty", "frequency_penalty"}


def test_log_probabilities_are_told_best_first_and_only_as_many_as_were_asked_for() -> None:
    known = {
        9: SimpleNamespace(logprob=-3.0, rank=7),
        4: SimpleNamespace(logprob=-0.5, rank=1),
        5: SimpleNamespace(logprob=-1.0, rank=2),
    }
    assert logprob(9, known, 2) == Logprob(9, -3.0, ((4, -0.5), (5, -1.0)))
    assert sampled(9, known, 0) == Sampled(9, Logprob(9, -3.0, ()))
    assert sampled(9, None, None) == Sampled(9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype"),
        ({"cache_tokens": 0}, "cache_tokens must be a whole number"),
        ({"step_tokens": 1 << 21}, "step_tokens must be a whole number"),
        ({"pool_tokens": 1, "pool_blocks": 1}, "exclude each other"),
        ({"block_tokens": 257}, "block_tokens must be a whole number 1 to 256"),
    ],
)
def test_a_wrong_option_is_named(options, message) -> None:
    with pytest.raises(BackendMisconfigured, match=message):
        read_options({"model": "m", **options})


def test_a_file_that_vllm_does_not_read_is_refused(tmp_path) -> None:
    file = tmp_path / "m.gguf"
    file.touch()
    with pytest.raises(BackendMisconfigured, match=r"vLLM is not installed|Hugging Face form"):
        VllmBackend(model=str(file))
