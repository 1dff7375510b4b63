"""`baton layout explain` says what a pair will do, or why it cannot."""

import msgspec
import pytest

from gateway.cli import BAD_CONFIG, main
from transfer.layout import KVLayout, Scales

SOURCE = KVLayout(
    model="m", weights="bfloat16", layers=4, kv_heads=2, head_dim=64, dtype="bfloat16",
    block_tokens=32, rope="half", axes="layer kv | block token head dim",
)  # fmt: skip
TARGET = msgspec.structs.replace(
    SOURCE, axes="block layer kv head token dim", block_tokens=16, dtype="int8",
    scales=Scales("layer block token kv head"),
)  # fmt: skip


@pytest.fixture
def files(tmp_path):
    source, target = tmp_path / "source.toml", tmp_path / "target.json"
    values = msgspec.to_builtins(SOURCE)
    lines = [f"{name} = {value!r}" for name, value in values.items() if value not in (None, [], ())]
    source.write_text("\n".join(lines))
    target.write_bytes(msgspec.json.encode(TARGET))
    return source, target


def test_a_pair_is_explained_with_plan_runs_bytes_and_cost(files, capsys):
    assert main(["layout", "explain", *map(str, files), "--tokens", "100"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["plan", "bytes", "runs", "rows", "write", "send", "digest"]
    assert lines["plan"].startswith("axes layer kv | block token head dim -> block layer kv head")
    assert "bfloat16 -> int8 (a float32 scale per" in lines["plan"]
    each = 4 * 2 * 2 * (64 + 4)
    assert lines["bytes"] == f"{100 * each:,} for 100 tokens, {each:,} each"
    assert "GB/s" in lines["write"]


def test_what_cannot_be_converted_is_said_with_the_reason(files, capsys):
    source, target = files
    target.write_bytes(msgspec.json.encode(msgspec.structs.replace(TARGET, layers=5)))
    assert main(["layout", "explain", str(source), str(target)]) == BAD_CONFIG
    assert "layers: the source has 4, the target 5" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["layers = ", "layers = 4", "\xff"])
def test_a_file_that_holds_no_layout_is_named(files, capsys, text):
    source, target = files
    source.write_text(text, encoding="latin-1")
    assert main(["layout", "explain", str(source), str(target)]) == BAD_CONFIG
    assert str(source) in capsys.readouterr().err


def test_a_length_of_nothing_is_refused(files, capsys):
    with pytest.raises(SystemExit):
        main(["layout", "explain", *map(str, files), "--tokens", "0"])
    assert "--tokens" in capsys.readouterr().err
