"""Tiny models in Hugging Face form, made by `transformers`, and the bundled real one."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.emulation.desk import Desk, bundled_model, engine

# Threads of one process wait for each other by spinning; beside other tests that costs more than
# a second core gives.
torch.set_num_threads(1)

SMALL = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama-untied": ("Llama", {"tie_word_embeddings": False, "attention_bias": True}),
    "llama-scaled": ("Llama", {"rope_parameters": SCALED}),
    "qwen2": ("Qwen2", {"head_dim": 8}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}


def make_model(kind: str) -> transformers.PreTrainedModel:
    """A model of random weights, whose norms and biases are random too."""
    name, changes = FAMILIES[kind]
    torch.manual_seed(len(kind))
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.35 if parameter.ndim == 2 else 0.2
            parameter.normal_(float(parameter.ndim == 1), spread)
    return model


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def family(request, tmp_path_factory):
    """A family's tiny model, and the folder it was saved to."""
    model = make_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="40KB" if request.param == "qwen2" else "1GB")
    return model, folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder):
    """Make desks over the tiny Llama."""
    made = []

    def make(**options) -> Desk:
        wanted = {"dtype": "float32", "pool_tokens": 2048, **options}
        made.append(engine(model=str(tiny_folder), **wanted))
        return Desk(made[-1], seed=len(made))

    yield make
    for backend in made:
        backend.close()


@pytest.fixture(scope="session")
def real():
    """The bundled model in float32, in the decode worker's default layout."""
    return Desk(engine(model=bundled_model(), dtype="float32", pool_tokens=8192))


@pytest.fixture(scope="session")
def real_elsewhere():
    """The same in the prefill worker's default layout."""
    backend = engine(
        model=bundled_model(),
        dtype="float32",
        pool_tokens=4096,
        block_tokens=32,
        axes="layer kv block token head dim",
    )
    return Desk(backend, seed=1)
