"""The engine's benchmark runs on a small model and writes what it promises."""

from __future__ import annotations

import json

import pytest
import torch

from tests.bench import engine


@pytest.fixture
def small_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_every_case_is_measured_beside_its_references(small_model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "figures.jsonl"
    threads = torch.get_num_threads()
    words = ["bench", "--model", str(small_model), "--threads", "1", "--prefill", "32"]
    words += ["--decode", "1,3", "--context", "24", "--seconds", "0", "--json", str(out)]
    monkeypatch.setattr("sys.argv", words)
    engine.main()
    torch.set_num_threads(threads)
    first, *rest = [json.loads(line) for line in out.read_text().splitlines()]
    assert {"machine", "commit", "configuration", "versions"} <= first.keys()
    assert [line["case"] for line in rest] == ["prefill 32", "decode 1 x 24", "decode 3 x 24"]
    for line in rest:
        assert all(speed > 0 for speed in line["tokens_per_second"].values())
        assert line["engine_to"]["transformers"] > 0
        assert line["engine_to_best_products"] > 0
    assert capsys.readouterr().out.count("thread(s)") == 3


def test_contenders_choose_the_same_token(small_model):
    from tests.bench.contenders import Engine, Transformers

    ours, theirs = Engine(small_model, 1024, "float32"), Transformers(small_model)
    assert ours.prefill(40)()[0].sampled[0].token == theirs.prefill(40)()
    tokens = [output.sampled[0].token for output in ours.decode(3, 33)()]
    assert tokens == theirs.decode(3, 33)()


def test_onnx_runtime_chooses_it_too_with_pages_or_without(small_model):
    from tests.bench.contenders import Engine
    from tests.bench.onnx_contenders import OnnxRuntime, WithoutPages

    torch_engine, paged = (
        Engine(small_model, 1024, "float32"),
        OnnxRuntime(small_model, 1024, "float32"),
    )
    whole = WithoutPages(small_model, "float32")
    first = torch_engine.prefill(40)()[0].sampled[0].token
    assert paged.prefill(40)()[0].sampled[0].token == first
    assert whole.prefill(40)().tolist() == [first]
    assert len(whole.decode(3, 33)()) == 3
    assert len({output.sampled[0].token for output in paged.decode(3, 33)()}) == 1
