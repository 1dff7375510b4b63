"""The engine computes what `transformers` computes, for every family it claims."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from backends.api import Row, Sampling
from tests.emulation.desk import Desk, Line, engine, nothing, prompts

LENGTHS = 6


def expected(model, tokens) -> np.ndarray:
    """Log probabilities after each of `tokens`."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits[0]
    return logits.double().log_softmax(-1).numpy()


def desk(folder, **options) -> Desk:
    return Desk(engine(model=str(folder), dtype="float32", pool_tokens=2048, **options))


def test_the_next_token_has_the_probabilities_of_transformers(family):
    model, folder = family
    ours = desk(folder)
    for prompt in prompts(LENGTHS, 211, 300):
        assert ours.logprobs_after(prompt) == pytest.approx(expected(model, prompt)[-1], abs=1e-3)


def test_chunks_and_decode_steps_have_them_too(family):
    model, folder = family
    ours = desk(folder, block_tokens=8)
    (prompt,) = prompts(1, 211, 90)
    prompt = (prompt * 90)[:90]
    line = Line(prompt, Sampling(temperature=0.0, logprobs=211))
    ours.prefill(line, chunk=37)
    ours.decode([line], 12)
    reference = expected(model, line.tokens)[len(prompt) - 1 :]
    for step, sampled in enumerate(line.sampled):
        for token, value in sampled.logprob.top:
            assert value == pytest.approx(reference[step][token], abs=1e-3)


@pytest.mark.parametrize("rope", ["half", "interleaved"])
def test_either_pairing_of_dimensions_gives_the_same_answer(family, rope):
    model, folder = family
    ours = desk(folder, rope=rope)
    assert ours.backend.info.layout.rope == rope
    prompt = prompts(LENGTHS, 211, 300)[-1]
    assert ours.logprobs_after(prompt) == pytest.approx(expected(model, prompt)[-1], abs=1e-3)


def test_the_prompts_own_probabilities_are_reported(family):
    model, folder = family
    ours = desk(folder)
    prompt = prompts(LENGTHS, 211, 300)[-1]
    reference = expected(model, prompt)
    found, cut = [], len(prompt) // 3
    line = Line(prompt)
    ours.cover(line, len(prompt))
    for start, end in ((0, cut), (cut, len(prompt))):
        row = Row(
            tokens=prompt[start:end],
            start=start,
            blocks=line.blocks,
            prompt_logprobs=2,
            following=prompt[start + 1 : end + 1],
            sequences=(line.sequence,) if end == len(prompt) else (),
        )
        (output,) = ours.backend.step([row], nothing)
        found.extend(output.prompt_logprobs)
    assert [one.token for one in found] == prompt[1:]
    for place, one in enumerate(found):
        assert one.logprob == pytest.approx(reference[place][one.token], abs=1e-3)
        best = np.argsort(-reference[place])[:2]
        assert [value for _, value in one.top] == pytest.approx(reference[place][best], abs=1e-3)


def test_end_tokens_are_those_of_the_generation_config(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "chat")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2, 7]}))
    assert desk(folder).backend.info.end_tokens == (2, 7)
    (folder / "generation_config.json").unlink()
    assert desk(folder).backend.info.end_tokens == (2,)


def test_weights_stored_in_half_precision_load_in_any(tiny_folder, tmp_path):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_folder).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    exact = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompt = prompts(LENGTHS, 211, 100)[-1]
    ours = desk(tmp_path)
    assert ours.backend.info.layout.weights == "float32"
    assert ours.logprobs_after(prompt) == pytest.approx(expected(exact, prompt)[-1], abs=1e-3)


def test_identity_is_the_checkpoints_whatever_the_engine_makes_of_it(tiny_folder, tmp_path):
    one = desk(tiny_folder, block_tokens=4, rope="interleaved").backend.info.layout
    other = engine(model=str(tiny_folder), dtype="bfloat16", pool_tokens=64).info.layout
    assert one.model == other.model
    assert (one.weights, other.weights) == ("float32", "bfloat16")

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_folder, tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert desk(folder).backend.info.layout.model != one.model
