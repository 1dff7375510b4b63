"""`baton check` says which workers will fit together, before anything is started."""

import json
import tomllib
from pathlib import Path

import msgspec
import pytest

from backends.foreseen import foresee
from gateway.cli.pairing import alone, pairs
from gateway.config import Config
from gateway.settings import ConfigError
from tests.control.test_cli import baton
from tests.emulation.desk import bundled_model
from tests.trtllm.play import write_model

SMALL = {"layers": 30, "kv_heads": 3, "head_dim": 64}
"""The bundled model's shape."""

DECODE = """
[workers.d]
role = "decode"
backend = "llamacpp"
options = { kv_dtype = "float16" }
"""


def check(workers: str) -> tuple[list[str], str]:
    """The lines about pairs, and what is wrong."""
    tree = {**tomllib.loads(workers), "model": {"source": bundled_model()}}
    config = msgspec.convert(tree, Config)
    try:
        found = pairs(config)
    except ConfigError as error:
        return [], str(error)
    return [it.line for it in found], " ".join(str(it) for it in alone(config, found))


def tensorrt(folder: Path, *, options: str = "", **model: object) -> str:
    path = write_model(folder / "model", **{**SMALL, **model})
    return f"""
[workers.p]
role = "prefill"
backend = "tensorrt_llm"
[workers.p.options]
model = {json.dumps(str(path))}
identity = "the other's"
{options}
"""


def test_workers_that_cut_their_pools_otherwise_fit(tmp_path: Path) -> None:
    shown, wrong = check(
        """
[workers.p]
role = "prefill"
options = { dtype = "float32", block_tokens = 32, rope = "half", shards = 3 }
[workers.d]
role = "decode"
options = { dtype = "float32", kv_dtype = "bfloat16" }
[workers.e]
role = "decode"
backend = "synthetic"
options = { model_shape = "elsewhere" }
""",
    )
    assert not wrong
    assert shown[0].startswith("p -> d: 3 to 1 pools; block 32 -> 16; dtype float32 -> bfloat16;")
    assert "rope half to interleaved" in shown[0]
    assert shown[1].startswith("p -> e: compared when they meet")


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ({"layers": 16}, "layers: the source has 16, the target 30"),
        ({"kv_heads": 6}, "kv_heads: the source has 6, the target 3"),
        ({"head_dim": 128}, "head_dim: the source has 128, the target 64"),
    ],
)
def test_shapes_that_cannot_be_converted_are_explained(
    tmp_path: Path, model: dict[str, int], why: str
) -> None:
    known = 'identity = "m/49152"\nweights = "synthetic"'
    workers = tensorrt(tmp_path, **model).replace('identity = "the other\'s"', known)
    workers += """
[workers.d]
role = "decode"
backend = "synthetic"
options = { model = "m", layers = 30, kv_heads = 3, head_dim = 64 }
"""
    _, wrong = check(workers)
    assert f"workers.p: p -> d: cannot hand over: {why}" in " ".join(wrong.split())


def test_another_model_is_explained_by_its_name(tmp_path: Path) -> None:
    _, wrong = check(tensorrt(tmp_path) + DECODE)
    assert "model: the source has \"the other's\", the target 'llama-30x576-" in wrong


def test_unlike_weights_are_explained(tmp_path: Path) -> None:
    _, wrong = check(
        """
[workers.p]
role = "prefill"
options = { dtype = "float32" }
[workers.d]
role = "decode"
options = { dtype = "bfloat16" }
""",
    )
    assert "weights: the source has 'float32', the target 'bfloat16'" in " ".join(wrong.split())


@pytest.mark.parametrize(("source", "target"), [(True, True), (True, False), (False, True)])
def test_unlike_weights_fit_where_both_ends_allow_them(source: bool, target: bool) -> None:
    shown, wrong = check(
        f"""
[workers.p]
role = "prefill"
unlike_weights = {str(source).lower()}
options = {{ dtype = "float32" }}
[workers.d]
role = "decode"
unlike_weights = {str(target).lower()}
options = {{ dtype = "bfloat16" }}
""",
    )
    allowed = source and target
    assert ("unlike weights are not allowed" not in wrong) is allowed
    assert ("cannot hand over" not in shown[0]) is allowed


def test_heads_that_cannot_be_shared_out_are_explained(tmp_path: Path) -> None:
    _, wrong = check(tensorrt(tmp_path, options="tensor_parallel = 2") + DECODE)
    assert "workers.p.options: tensor_parallel: 3 heads cannot be shared out to 2 ranks" in wrong


def test_files_on_another_machine_are_left_to_the_worker(tmp_path: Path) -> None:
    shown, wrong = check(
        """
[workers.p]
role = "prefill"
backend = "vllm"
options = { model = "/there/only" }
[workers.d]
role = "decode"
""",
    )
    assert not wrong
    assert shown[0].startswith("p -> d: compared when they meet (model: '/there/only' is neither")


def test_the_command_shows_what_it_found(tmp_path: Path) -> None:
    workers = (
        tensorrt(tmp_path).replace('"tensorrt_llm"', '"synthetic"').split("[workers.p.options]")
    )
    (tmp_path / "baton.toml").write_text(
        workers[0] + '[workers.d]\nrole = "decode"\nbackend = "synthetic"\n'
    )
    good = baton("check", "--config", "baton.toml", cwd=tmp_path)
    assert "pair     p -> d: copy as it is" in good.stdout
    with (tmp_path / "baton.toml").open("a") as file:
        file.write("options = { layers = 7 }\n")
    bad = baton("check", "--config", "baton.toml", cwd=tmp_path)
    assert bad.returncode == 2
    assert "layers: the source has 2, the target 7" in bad.stderr


def test_what_is_foreseen_of_defaults_is_what_they_are() -> None:
    from backends.emulation.options import Options as Emulation
    from backends.emulation.synthetic import SyntheticBackend
    from backends.onnxruntime.options import Options as OnnxRuntime
    from backends.tensorrt_llm.options import Options as TensorRT
    from backends.vllm.options import Options as Vllm

    model = bundled_model()
    for name, kind in (("emulation", Emulation), ("onnxruntime", OnnxRuntime), ("vllm", Vllm)):
        seen, options = foresee(name, {}, model), kind(model=model)
        assert seen.block_tokens == options.block_tokens, name
        assert seen.weights in (getattr(options, "dtype", None), None), name
    assert TensorRT(model=model).block_tokens == 32
    seen = foresee("synthetic", {}, "")
    assert seen.layout(seen, seen.identity) == (SyntheticBackend(pool_tokens=64).info.layout)
