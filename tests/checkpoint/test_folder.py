"""A GGUF file written as a Hugging Face folder is the same model, and is known as it."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from backends.checkpoint.gguf_file import GGUFCheckpoint
from backends.checkpoint.huggingface import ORIGIN, HuggingFaceCheckpoint
from gateway.cli import BAD_CONFIG, main
from gateway.cli.model import find_model
from gateway.text import load_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "smollm2"
    assert main(["export", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def original() -> GGUFCheckpoint:
    return GGUFCheckpoint(find_model("bundled"))


def test_a_copy_is_known_as_the_checkpoint_that_it_was_made_of(folder, original) -> None:
    copy = HuggingFaceCheckpoint(folder)
    assert copy.identity == original.identity
    changes = {"pairing": "half"}
    assert copy.spec == msgspec.structs.replace(original.spec, **changes)


def test_weights_are_copied_as_they_are_but_for_the_order_that_rope_pairs(folder, original) -> None:
    copy, spec = HuggingFaceCheckpoint(folder), original.spec
    for name in ("token_embd.weight", "blk.7.attn_v.weight", "blk.29.ffn_down.weight"):
        np.testing.assert_array_equal(copy.tensor(name), original.tensor(name))
    for name, heads in (("blk.3.attn_q.weight", spec.heads), ("blk.3.attn_k.weight", 3)):
        ours = copy.tensor(name).reshape(heads, 2, spec.head_dim // 2, -1)
        theirs = original.tensor(name).reshape(heads, spec.head_dim // 2, 2, -1)
        for half in (0, 1):
            np.testing.assert_array_equal(ours[:, half], theirs[:, :, half])


def test_its_texts_and_chats_become_the_same_tokens(folder) -> None:
    ours, theirs = load_text(folder), load_text(find_model("bundled"))
    chat = [{"role": "user", "content": "What is 12 + 7?\n\n  Naïve 🙃"}]
    text = theirs.chat_prompt(chat)
    assert ours.chat_prompt(chat) == text
    tokens = theirs.encode(text, add_special_tokens=True)
    assert ours.encode(text, add_special_tokens=True) == tokens
    assert ours.context_tokens == theirs.context_tokens


def test_a_copy_that_was_changed_is_a_model_of_its_own(folder, original, tmp_path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    weights = tmp_path / "model.safetensors"
    weights.unlink()
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert HuggingFaceCheckpoint(tmp_path).identity != original.identity


def test_a_damaged_statement_of_origin_is_refused(folder, tmp_path, capsys) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / ORIGIN).unlink()
    (tmp_path / ORIGIN).write_text('{"folder": 3}')
    with pytest.raises(Exception, match=ORIGIN):
        HuggingFaceCheckpoint(tmp_path)


def test_a_folder_with_files_is_left_alone(tmp_path, capsys) -> None:
    (tmp_path / "mine.txt").touch()
    assert main(["export", str(tmp_path)]) == BAD_CONFIG
    assert "is not empty" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_is_not_made_of_a_folder(folder, tmp_path, capsys) -> None:
    assert main(["export", "--model", str(folder), str(tmp_path / "new")]) == BAD_CONFIG
    assert "is a folder in Hugging Face form already" in capsys.readouterr().err
