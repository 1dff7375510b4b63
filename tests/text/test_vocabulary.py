"""Vocabularies: read from files, checked against the reference tokenizer library's own decoding."""

import asyncio
import json
import time
from pathlib import Path

import pytest
from gguf import GGUFWriter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gateway.cli.model import find_model
from gateway.errors import PromptTooLong
from gateway.text import ModelUnreadable, TemplateFailed, TemplateMissing, Vocabulary, load_text
from gateway.text.pieces import BYTE_OF

CHAT = [{"role": "user", "content": "hi"}]


def write_gguf(path: Path, *, pre="gpt-2", kind="gpt2", template=None, bos=False) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    tokens = ["<s>", "<end of turn>", *sorted(BYTE_OF), "1", "12", "he"]
    tokens = list(dict.fromkeys(tokens))
    writer.add_token_list(tokens)
    writer.add_token_types([3, 4] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["1 2", "h e"])
    writer.add_bos_token_id(0)
    writer.add_add_bos_token(bos)
    if template is not None:
        writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def words(text: str, vocabulary: Vocabulary) -> list[str]:
    ids = vocabulary.encode(text, add_special_tokens=False)
    return [vocabulary.token_bytes(token).decode() for token in ids]


async def test_the_bundled_model_reads_and_writes_its_language(vocabulary: Vocabulary):
    text = "Hello 12345 world 🙃 <|im_end|> it's   \n\n fine"
    ids = await vocabulary.tokens_of(text, add_special_tokens=True)
    assert vocabulary.decode(ids) == text
    assert 2 in ids
    assert "".join(words("345", vocabulary)) == "345"
    assert len(words("345", vocabulary)) == 3
    assert (vocabulary.size, vocabulary.context_tokens) == (49152, 8192)


@pytest.mark.slow
def test_it_agrees_with_transformers_on_many_texts(vocabulary: Vocabulary):
    transformers = pytest.importorskip("transformers")
    path = find_model("bundled")
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in (
        "a",
        " a",
        "it's 2026",
        "Zürich\n\n\tΩ≈ç√",
        "def f(x):\n    return x",
        "日本語",
        "🙃 x",
    ):
        ours = vocabulary.encode(text, add_special_tokens=False)
        assert ours == theirs.encode(text, add_special_tokens=False)
    prompt = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert vocabulary.chat_prompt(CHAT) == prompt


async def longest_pause(vocabulary: Vocabulary) -> float:
    """For how long the loop stood still while it waited for a long text, in seconds."""
    longest = 0.0
    done = asyncio.Event()

    async def tick() -> None:
        nonlocal longest
        while not done.is_set():
            before = time.perf_counter()
            await asyncio.sleep(0)
            longest = max(longest, time.perf_counter() - before)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(tick())
        ids = await vocabulary.tokens_of("A quick brown fox. " * 10_000, add_special_tokens=False)
        done.set()
    assert len(ids) == 50_001
    return longest


async def test_a_long_text_does_not_block_the_loop(vocabulary: Vocabulary):
    """A machine that is busy with something else does so now and then, but not each time."""
    for _ in range(20):
        if await longest_pause(vocabulary) < 0.1:
            return
    pytest.fail("it stood still each time")


async def test_a_text_that_cannot_fit_is_refused_unread(vocabulary: Vocabulary):
    with pytest.raises(PromptTooLong, match="8192 tokens"):
        await vocabulary.tokens_of("x" * 4_000_000, add_special_tokens=False)
    with pytest.raises(PromptTooLong, match="8193 cannot fit"):
        vocabulary.decode([0] * 8193)


@pytest.mark.parametrize(
    ("pre", "cut"),
    [
        ("gpt-2", ["12", "1", "he", "+", "\n"]),
        ("smollm", ["1", "2", "1", "he", "+", "\n"]),
        ("llama-bpe", ["12", "1", "he", "+", "\n"]),
        ("qwen2", ["1", "2", "1", "he", "+", "\n"]),
    ],
)
def test_each_pre_tokenizer_cuts_as_its_models_were_taught(
    tmp_path: Path, pre: str, cut: list[str]
):
    assert words("121he+\n", load_text(write_gguf(tmp_path / "m.gguf", pre=pre))) == cut


def test_a_begin_token_is_added_where_the_file_says_so(tmp_path: Path):
    vocabulary = load_text(write_gguf(tmp_path / "m.gguf", bos=True))
    assert vocabulary.encode("he", add_special_tokens=True)[0] == 0
    assert len(vocabulary.encode("he", add_special_tokens=False)) == 1


def test_added_tokens_are_never_split_and_only_special_ones_are_skipped(tmp_path: Path):
    vocabulary = load_text(write_gguf(tmp_path / "m.gguf"))
    ids = vocabulary.encode("<s>he<end of turn>", add_special_tokens=False)
    assert len(ids) == 3
    skipping = vocabulary.detokenizer(skip_special_tokens=True)
    assert "".join(map(skipping.push, ids)) == "he<end of turn>"


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"pre": "jais-2"}, "jais-2"),
        ({"kind": "llama"}, "'llama'"),
        ({"template": "{% if %}"}, "chat template"),
    ],
)
def test_a_file_of_an_unsupported_kind_is_refused_by_name(tmp_path: Path, how: dict, says: str):
    with pytest.raises(ModelUnreadable, match=says):
        load_text(write_gguf(tmp_path / "m.gguf", **how))


@pytest.mark.parametrize("size", [0, 3, 10, 30, 200, 1000])
def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, size: int):
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:size])
    with pytest.raises(ModelUnreadable):
        load_text(path)


def test_a_model_without_a_template_says_so(tmp_path: Path):
    with pytest.raises(TemplateMissing):
        load_text(write_gguf(tmp_path / "m.gguf")).chat_prompt(CHAT)


def test_a_template_may_refuse_and_may_not_escape_its_sandbox(tmp_path: Path):
    refusing = load_text(
        write_gguf(tmp_path / "a.gguf", template="{{ raise_exception('only users') }}")
    )
    with pytest.raises(TemplateFailed, match="only users"):
        refusing.chat_prompt(CHAT)
    escaping = load_text(
        write_gguf(tmp_path / "b.gguf", template="{{ messages.__class__.__mro__ }}")
    )
    with pytest.raises(TemplateFailed):
        escaping.chat_prompt(CHAT)


def test_templates_know_tokens_variables_json_and_the_date(tmp_path: Path):
    source = "{{ bos_token }}{{ messages | tojson }}{{ mood }}{{ strftime_now('%Y')[:1] }}"
    vocabulary = load_text(write_gguf(tmp_path / "m.gguf", template=source))
    text = vocabulary.chat_prompt([{"role": "user", "content": "<ü>"}], variables={"mood": "!"})
    assert text == '<s>[{"role": "user", "content": "<ü>"}]!2'


def write_folder(folder: Path, tokenizer: Tokenizer, **settings: object) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 32}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def byte_fallback() -> Tokenizer:
    """A vocabulary of the other kind: blanks as `▁`, unknown characters as bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def test_a_folder_reads_as_well_with_any_kind_of_vocabulary(tmp_path: Path):
    named = [{"name": "default", "template": "{{ eos_token }}{{ messages[0].content }}"}]
    folder = write_folder(
        tmp_path, byte_fallback(), eos_token={"content": "</s>"}, chat_template=named
    )
    vocabulary = load_text(folder)
    assert vocabulary.chat_prompt(CHAT) == "</s>hi"
    (folder / "chat_template.jinja").write_text("file first")
    assert load_text(folder).chat_prompt(CHAT) == "file first"
    assert vocabulary.context_tokens == 32
    ids = vocabulary.encode("ab a🙃 a", add_special_tokens=False)
    detokenizer = vocabulary.detokenizer(skip_special_tokens=True)
    pieces = [detokenizer.push(token) for token in ids] + [detokenizer.flush()]
    assert "".join(pieces) == "ab a🙃 a"
    assert "🙃" in pieces


def test_a_continuation_keeps_its_first_blank(tmp_path: Path):
    vocabulary = load_text(write_folder(tmp_path, byte_fallback()))
    before = vocabulary.encode("b", add_special_tokens=False)
    (blank_a,) = vocabulary.encode("a", add_special_tokens=False)
    assert vocabulary.decode([blank_a]) == "a"
    assert vocabulary.detokenizer(skip_special_tokens=True, before=before).push(blank_a) == " a"


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_a_folder_without_its_files_is_refused_by_name(tmp_path: Path, missing: str):
    folder = write_folder(tmp_path, byte_fallback())
    (folder / missing).unlink()
    with pytest.raises(ModelUnreadable, match=missing):
        load_text(folder)
