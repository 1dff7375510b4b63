"""vLLM as a backend, for prefill and decode, on the engine contract.

`engine.py` is the plug-in, `process.py` what runs beside vLLM in a process of its own, and
`connector.py` what vLLM itself loads to bring KV in and out.
"""

from backends.vllm.engine import VllmBackend

__all__ = ["VllmBackend"]
