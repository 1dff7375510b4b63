"""The comparison of what codes cost measures every form against the undisturbed run."""

from __future__ import annotations

import json

import pytest
import torch

from tests.bench import wire

pytestmark = pytest.mark.slow


def test_every_form_is_compared_with_the_undisturbed_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wire, "WORDS", 4)
    words = ["bench", "--part", "exactness", "--prompts", "2", "--threads", "1"]
    monkeypatch.setattr("sys.argv", [*words, "--folder", str(tmp_path)])
    threads = torch.get_num_threads()
    wire.main()
    torch.set_num_threads(threads)
    (file,) = tmp_path.iterdir()
    _, *lines = [json.loads(line) for line in file.read_text().splitlines()]
    forms = {it["form"]: it for it in lines}
    assert list(forms) == ["float16", "bfloat16", "int8", "float8_e4m3"]
    assert forms["int8"]["token_bytes"] < 0.6 * forms["float16"]["token_bytes"]
    assert 0 < forms["float16"]["kl_mean"] < forms["int8"]["kl_mean"]
    assert forms["int8"]["kl_mean"] < forms["float8_e4m3"]["kl_mean"]
    assert "words alike" in capsys.readouterr().out
