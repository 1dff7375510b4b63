"""What the executor's module has, by which its releases can be told apart."""

from tensorrt_llm.standin.executor import Executor as PyExecutor
from tensorrt_llm.standin.flavour import since

if since("1.3"):

    class AsyncTransferManager:
        """Holds the blocks of every request that is being saved."""


__all__ = ["PyExecutor"]
