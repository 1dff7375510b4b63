"""`baton conformance` tells people what to fix, and machines by its exit code."""

import msgspec
import pytest
import structlog

from gateway.cli import BAD_CONFIG, main
from gateway.cli.conformance import FAILED


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
        (["synthetic", "--options", "layerz=2"], "no option 'layerz'"),
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


def test_a_broken_plug_in_ends_it_with_what_to_fix(capsys):
    assert main(["conformance", BROKEN, "--tiny-model", "--only", "its_statements"]) == FAILED
    out = capsys.readouterr().out
    assert "BROKEN   its_statements_make_sense" in out
    assert "-> info.sampling: ['top_q'] are no fields of Sampling" in out
