"""The comparison of the roofline with real engines runs, and says how far each prediction was."""

from __future__ import annotations

import json

import torch

from tests.bench import roofline


def test_every_case_is_predicted_and_measured(tmp_path, monkeypatch, capsys):
    small = {"PROMPTS": (16,), "BATCHES": (1, 2), "CONTEXTS": (16,), "SECONDS": 0.0}
    for name, value in {**small, "READ_BYTES": 1 << 22, "MOST_TOKENS": 512}.items():
        monkeypatch.setattr(roofline, name, value)
    words = ["bench", "--threads", "1", "--engines", "torch float32", "--folder", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    threads = torch.get_num_threads()
    roofline.main()
    torch.set_num_threads(threads)
    (file,) = tmp_path.iterdir()
    _, profile, *cases = [json.loads(line) for line in file.read_text().splitlines()]
    assert profile["profile"]["flops"]["float32"]["value"] > 1e9
    assert [it["phase"] for it in cases] == ["prefill", "decode", "decode"]
    assert all(it["measured_seconds"] > 0 < it["predicted_seconds"] for it in cases)
    shown = capsys.readouterr().out
    assert "batch 2, 16 tokens" in shown
    assert "in the mean" in shown
