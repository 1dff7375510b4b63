"""SmolLM2-135M from its GGUF file: against `transformers`, across pools, batches and precisions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from backends.api import Sampling
from backends.checkpoint.gguf_file import GGUFCheckpoint
from backends.checkpoint.huggingface import _IN_LAYER, _TOP
from backends.checkpoint.rope import repaired
from tests.emulation.desk import Desk, Line, bundled_model, engine, hand_over, nothing, prompts
from tests.support.margin import assert_same_or_near_tie

pytestmark = pytest.mark.slow

VOCABULARY = 49152
BFLOAT16_KL = 0.02
"""Bound on the mean KL divergence of bfloat16 from float32, in nats per token."""
HALF_CACHE_KL = 1e-4
"""The same bound where only the cache is bfloat16."""


def hugging_face_names() -> dict[str, str]:
    """GGUF names to those of `transformers`."""
    names = {short: long for long, short in _TOP.items()}
    for layer in range(30):
        for long, short in _IN_LAYER.items():
            names[f"blk.{layer}.{short}.weight"] = f"model.layers.{layer}.{long}.weight"
    return names


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The dequantised tensors in the hands of `transformers`, and the folder it saved them to."""
    checkpoint = GGUFCheckpoint(Path(bundled_model()))
    spec, names = checkpoint.spec, hugging_face_names()
    config = transformers.LlamaConfig(
        vocab_size=spec.vocabulary,
        hidden_size=spec.hidden,
        intermediate_size=spec.feed_forward,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        max_position_embeddings=spec.context_tokens,
        rms_norm_eps=spec.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tensors = {}
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        for kind, heads in (("attn_q.", spec.heads), ("attn_k.", spec.kv_heads)):
            if kind in name:
                tensor = repaired(tensor, heads, "interleaved", "half")
        tensors[names[name]] = torch.from_numpy(tensor)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    checkpoint.close()
    folder = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(folder)
    return model, folder


def expected(model, tokens) -> np.ndarray:
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logits = model(ids, attention_mask=torch.ones_like(ids), logits_to_keep=1).logits[0, -1]
    return logits.double().log_softmax(-1).numpy()


def test_probabilities_are_those_of_transformers(real, reference):
    for prompt in prompts(4, VOCABULARY, 400):
        found = real.logprobs_after(prompt)
        assert np.abs(found - expected(reference[0], prompt)).max() < 1e-3


def test_the_hugging_face_folder_of_the_same_weights_gives_the_same_text(real, reference):
    folder = Desk(engine(model=str(reference[1]), dtype="float32", pool_tokens=512), seed=3)
    assert folder.backend.info.layout.rope == "half"
    assert real.backend.info.layout.rope == "interleaved"
    prompt = prompts(5, VOCABULARY, 100)[-1]
    assert np.abs(folder.logprobs_after(prompt) - real.logprobs_after(prompt)).max() < 1e-3


def test_the_vocabulary_and_the_end_token_are_the_files(real):
    info = real.backend.info
    assert (info.vocabulary, info.end_tokens, info.context_tokens) == (VOCABULARY, (2,), 8192)
    assert info.layout.model.startswith("llama-30x576-")


def test_decoding_in_another_pool_gives_the_tokens_of_decoding_in_place(real, real_elsewhere):
    for prompt in prompts(6, VOCABULARY, 400):
        line = Line(prompt)
        real_elsewhere.prefill(line, chunk=256)
        arrived = hand_over(real_elsewhere, line, real)
        real.decode([arrived], 12)
        real_elsewhere.decode([line], 12)
        real.release(arrived)
        real_elsewhere.release(line)
        assert_same_or_near_tie(
            line.generated, arrived.generated, prompt=prompt, logits_after=real.logprobs_after
        )


def test_a_seeded_sequence_is_the_same_alone_and_in_a_batch_of_sixteen(real, real_elsewhere):
    warm = Sampling(temperature=1.0)
    texts = prompts(16, VOCABULARY, 60)
    lines = [Line(prompt, warm, seed=i) for i, prompt in enumerate(texts)]
    for line in lines:
        real.prefill(line)
    real.decode(lines, 8)
    for number in (0, 7, 15):
        alone = real_elsewhere.text(texts[number], 9, sampling=warm, seed=number)
        assert_same_or_near_tie(
            alone,
            lines[number].generated,
            prompt=texts[number],
            logits_after=real.logprobs_after,
            temperature=1.0,
            seed=number,
        )
    real.release(*lines)


def distributions(desk: Desk, text: list[int]) -> np.ndarray:
    """Log probabilities of every token after each of `text` but the last, by one chunk."""
    line = Line(text)
    row = desk.row(line, 0, len(text))
    row.prompt_logprobs, row.following = VOCABULARY, text[1:]
    (output,) = desk.backend.step([row], nothing)
    desk.release(line)
    found = np.empty((len(text) - 1, VOCABULARY))
    for place, one in enumerate(output.prompt_logprobs):
        ids, values = zip(*one.top, strict=True)
        found[place, list(ids)] = values
    return found


@pytest.mark.parametrize(
    ("precision", "bound"),
    [
        ({"dtype": "bfloat16"}, BFLOAT16_KL),
        ({"dtype": "float32", "kv_dtype": "bfloat16"}, HALF_CACHE_KL),
        ({"dtype": "float32", "kv_dtype": "float16"}, HALF_CACHE_KL),
    ],
    ids=str,
)
def test_a_lower_precision_changes_the_distribution_by_less_than_its_bound(real, precision, bound):
    other = Desk(engine(model=bundled_model(), pool_tokens=256, **precision))
    divergences: list[float] = []
    for prompt in prompts(2, VOCABULARY, 8):
        text = [*prompt, *real.text(prompt, 8)]
        exact, rounded = (distributions(desk, text) for desk in (real, other))
        divergences.extend((np.exp(exact) * (exact - rounded)).sum(-1))
    assert np.mean(divergences) < bound
    assert max(divergences) > 0, "the precision made no difference at all: was it applied?"
