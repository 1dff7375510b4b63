"""What the llama.cpp backend refuses before it loads, and the float32 copy it makes; without it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from backends.checkpoint.gguf_file import GGUFCheckpoint
from backends.errors import BackendMisconfigured
from backends.llamacpp.float32 import float32_copy
from backends.llamacpp.options import read_options
from tests.support.tiny_gguf import write_gguf


def told(_phase: str, _fraction: float) -> None:
    pass


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", extra={"general.name": "tiny"})


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"model": "/nowhere"}, "model: llama.cpp reads .gguf files; '/nowhere' is none"),
        ({"weights": "q8_0"}, "weights: "),
        ({"kv_dtype": "bfloat16"}, "kv_dtype: "),
        ({"threads": 0}, "threads must be a whole number 1 to 1024, is 0"),
        ({"max_batch": 248}, "max_batch must be a whole number 1 to 247, is 248"),
        ({"block_tokens": 257}, "block_tokens must"),
        ({"pool_tokens": 64, "pool_blocks": 4}, "pool_tokens and pool_blocks exclude each other"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_by_its_name(tiny: Path, options: dict, cause: str) -> None:
    with pytest.raises(BackendMisconfigured, match=cause):
        read_options({"model": str(tiny), **options})


def test_the_copy_has_every_tensor_as_every_engine_dequantises_it(
    tiny: Path, tmp_path: Path
) -> None:
    original = GGUFCheckpoint(tiny)
    path = float32_copy(original, str(tmp_path / "cache"), told)
    copy = GGUFCheckpoint(path)
    assert copy.spec == original.spec
    assert copy.metadata == original.metadata
    for name in original.names():
        kind, _ = copy.stored(name)
        assert kind.name == "F32"
        assert np.array_equal(copy.tensor(name), original.tensor(name))
    assert [it.name for it in path.parent.iterdir()] == [f"{original.identity}-float32.gguf"]


def test_the_copy_is_made_once_and_again_when_it_is_damaged(tiny: Path, tmp_path: Path) -> None:
    original = GGUFCheckpoint(tiny)
    path = float32_copy(original, str(tmp_path), told)
    whole, first = path.read_bytes(), path.stat()
    assert float32_copy(original, str(tmp_path), told).stat().st_mtime_ns == first.st_mtime_ns
    path.write_bytes(whole[:-40])
    assert float32_copy(original, str(tmp_path), told).read_bytes() == whole


def test_a_folder_that_cannot_be_written_to_is_named(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BackendMisconfigured, match=f"cache_dir: cannot write {tmp_path}/file/"):
        float32_copy(GGUFCheckpoint(tiny), str(tmp_path / "file"), told)


def test_the_library_is_imported_only_when_the_backend_is_asked_for() -> None:
    program = (
        "import sys, backends.llamacpp, backends.llamacpp.cells, backends.llamacpp.options;"
        "print('llama_cpp' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert answer.stdout.strip() == "False"
