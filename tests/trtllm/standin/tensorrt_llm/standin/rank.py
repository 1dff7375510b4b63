"""One rank, as a thread or a process."""

import pickle
import threading

from tensorrt_llm.standin import comm
from tensorrt_llm.standin.executor import Executor


def main(raw, knobs, rank, world, connections, inbox):
    """One rank, from its first breath to its last."""
    from tensorrt_llm.llmapi.llm_args import TorchLlmArgs

    talk = comm.Comm(rank, world, connections)
    comm.enter(talk)
    try:
        executor = Executor(TorchLlmArgs(**pickle.loads(raw)), knobs, talk, inbox)
    except BaseException as error:  # whatever it was, the client's process raises it
        failure = error
    else:
        failure = None
    failures = talk.allgather(_portable(failure))
    first = next((it for it in failures if it is not None), None)
    if inbox is not None:
        inbox.send(("up", first))
    if first is not None:
        return
    try:
        executor.run()
    except BaseException as error:
        if inbox is None:
            raise
        inbox.send(("dead", f"{type(error).__name__}: {error}"))
        if threading.current_thread() is threading.main_thread():
            raise


def _portable(error):
    if error is None:
        return None
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
