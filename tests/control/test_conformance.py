"""`baton conformance` tells people what to fix, and machines by its exit code."""

import msgspec
import pytest
import structlog

from gateway.cli import BAD_CONFIG, main
from gateway.cli.conformance import FAILED, UNPROVEN


@pytest.fixture(autouse=True)
def _logs_as_before():
    yield
    structlog.reset_defaults()  # the command sends logs to a standard error that is gone by then


SMALL = ["pool_tokens=512", "context_tokens=64", "head_dim=16"]
BROKEN = "tests.conformance.mutants.stating:UnknownParameter"


class Unmade:
    """A plug-in whose device is not there."""

    def __init__(self) -> None:
        raise RuntimeError("no driver")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nobody"], "no backend is called 'nobody'; installed: "),
        (["synthetic", "--options", "layerz=2"], "no option 'layerz' (did you mean 'layers'?)"),
        (["emulation", "--options", "progress=1"], "no option 'progress'"),
        (["synthetic", "--options", "layers=none"], "layers"),
        (["emulation"], "needs the option 'model'"),
        (["synthetic", "--options", "nowhere.toml"], "nowhere.toml"),
        (["backends.nowhere:Acme"], "backends.nowhere"),
        (["backends.testing:Acme"], "Acme"),
        ([f"{__name__}:Unmade"], "it cannot be made: no driver"),
    ],
)
def test_what_cannot_be_examined_is_said_before_anything_is(words, complaint, capsys):
    assert main(["conformance", *words]) == BAD_CONFIG
    assert complaint in capsys.readouterr().err


def test_options_come_from_files_and_words(tmp_path, capsys):
    file, answer = tmp_path / "options.toml", tmp_path / "answer.json"
    file.write_text("layers = 2\nhead_dim = 32\nmodel = 'from a file'\n")
    only = ["--only", "decode_after_handoff", "--json", str(answer)]
    words = [str(file), *SMALL, "model=made up", "vocabulary=100"]
    assert main(["conformance", "synthetic", "--options", *words, *only]) == 0
    report = msgspec.json.decode(answer.read_bytes())
    assert report["options"]["model"] == "made up"
    assert report["options"]["layers"] == 2
    assert report["options"]["head_dim"] == 16
    assert report["states"]["vocabulary"] == 100
    out = capsys.readouterr().out
    assert "ok       decode_after_handoff_equals_decode_in_place" in out
    assert (
        "reference: 'made up' is no checkpoint; name one for the same model with --reference" in out
    )


def test_whoever_cannot_be_shown_to_hand_over_ends_otherwise_than_whoever_can(tmp_path, capsys):
    answer = tmp_path / "answer.json"
    words = ["--only", "the_reference_continues", "--json", str(answer)]
    assert main(["conformance", "synthetic", "--options", *SMALL, *words]) == UNPROVEN
    assert capsys.readouterr().out.endswith(
        "NOT PROVEN AT ITS CORE: the_reference_continues_what_it_computed\n"
    )
    assert msgspec.json.decode(answer.read_bytes())["proven"] is False
    beside = ["--reference", "synthetic", *SMALL, "block_tokens=8"]
    assert main(["conformance", "synthetic", "--options", *SMALL, *words, *beside]) == 0


def test_a_reference_with_a_model_gets_that_of_the_plug_in(capsys):
    name = "tests.conformance.mutants.sound:Sound"
    only = ["--only", "it_states_what", "--reference", "emulation", "dtype=float32", "threads=1"]
    assert main(["conformance", name, "--tiny-model", *only]) == 0
    assert "ok       it_states_what_its_reference_does" in capsys.readouterr().out


def test_a_broken_plug_in_ends_it_with_what_to_fix(capsys):
    assert main(["conformance", BROKEN, "--tiny-model", "--only", "its_statements"]) == FAILED
    out = capsys.readouterr().out
    assert "BROKEN   its_statements_make_sense" in out
    assert "-> info.sampling: ['top_q'] are no fields of Sampling" in out
