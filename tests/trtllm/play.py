"""Puts a stand-in on the path, in one of its flavours, and takes it away again."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support.patience import PATIENCE_SECONDS

STANDIN = Path(__file__).parent / "standin"
FLAVOURS = ("1.2", "1.3", "main")


def _forget() -> None:
    """The library, and the one module of ours that inherits from it."""
    for name in [it for it in sys.modules if it.split(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]
    sys.modules.pop("backends.tensorrt_llm.connector", None)


@contextlib.contextmanager
def standin(
    flavour: str, *, processes: bool = False, lacks: str = "", **knobs: Any
) -> Iterator[None]:
    """Inside, `tensorrt_llm` is the stand-in of that release. Modules are imported afresh."""
    environment = {
        "TLLM_STANDIN": flavour,
        "TLLM_STANDIN_KNOBS": json.dumps(knobs),
        "TLLM_STANDIN_LACKS": lacks,
        "TLLM_WORKER_USE_SINGLE_PROCESS": "0" if processes else "1",
    }
    before = {name: os.environ.get(name) for name in environment}
    _forget()
    sys.path.insert(0, str(STANDIN))
    os.environ.update(environment)
    try:
        yield
    finally:
        sys.path.remove(str(STANDIN))
        _forget()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


SHAPE = {"layers": 3, "kv_heads": 2, "head_dim": 16}


def write_model(
    folder: Path, *, layers: int = 3, kv_heads: int = 2, head_dim: int = 16, **more: Any
) -> Path:
    """A folder with the `config.json` of a small Llama, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * 2,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": kv_heads * 2 * head_dim,
        "intermediate_size": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "torch_dtype": "float16",
        "eos_token_id": 2,
        **more,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Gates:
    """Points at which a stand-in can be held (see `Knobs.gate`)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def shut(self, name: str) -> None:
        (self._folder / f"{name}.reached").unlink(missing_ok=True)
        (self._folder / name).touch()

    def open(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    def reached(self, name: str) -> bool:
        return (self._folder / f"{name}.reached").exists()

    def __str__(self) -> str:
        return str(self._folder)


def until(true: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> None:
    """Wait until it is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.002)
