"""`baton roofline` prints what a profile predicts, and says that it is emulated."""

import pytest

from gateway.cli import BAD_CONFIG, main


def test_a_prediction_says_that_it_is_one_and_from_which_figures(capsys):
    assert main(["roofline", "h200", "--model", "llama-3.1-70b", "--devices", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("EMULATED: 2 x NVIDIA H200")
    assert "batch 32" in shown
    assert "memory_bytes_per_second" in shown
    assert "peak" in shown
    assert "assumed" in shown


def test_what_does_not_fit_is_said(capsys):
    assert main(["roofline", "jetson-agx-orin", "--model", "llama-3.1-70b"]) == 0
    shown = capsys.readouterr().out
    assert "THE WEIGHTS DO NOT FIT" in shown
    assert "no room" in shown


@pytest.mark.parametrize(
    "words",
    [
        ["roofline", "abacus", "--model", "llama-3.1-8b"],
        ["roofline", "h100", "--model", "abacus"],
        ["roofline", "h100", "--model", "llama-3.1-8b", "--devices", "0"],
        ["roofline", "groq-lpu", "--model", "llama-3.1-8b"],
    ],
)
def test_an_argument_that_cannot_be_used_is_named(words, capsys):
    assert main(words) == BAD_CONFIG
    assert "roofline" in capsys.readouterr().err
