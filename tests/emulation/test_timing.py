"""The real model at the pace of an accelerator that is not there."""

from __future__ import annotations

import time

import pytest

from backends.emulation.profile import load_profile, load_shape
from backends.emulation.roofline import Roofline, Span
from backends.errors import BackendMisconfigured
from tests.emulation.desk import Desk, Line, engine

EDGE = {"profile": "jetson-agx-orin", "model_shape": "llama-3.1-8b"}


def desk(folder, **options) -> Desk:
    wanted = {"dtype": "float32", "pool_tokens": 2048, **EDGE, **options}
    return Desk(engine(model=str(folder), **wanted))


def test_the_real_model_takes_the_time_of_another_on_another_device(tiny_folder, tiny):
    slow = desk(tiny_folder)
    assert slow.backend.info.emulated
    assert slow.backend.info.emulates == "NVIDIA Jetson AGX Orin 64 GB, llama-3.1-8b"
    expected = Roofline(
        load_profile("jetson-agx-orin"),
        load_shape("llama-3.1-8b"),
        weights="bfloat16",
        kv_bytes=4,
    )
    line, alike = Line(range(5, 45)), Line(range(5, 45))
    layers: list[float] = []
    started = time.monotonic()
    row = slow.row(line, 0, 40)
    (output,) = slow.backend.step([row], lambda _, __: layers.append(time.monotonic() - started))
    took = time.monotonic() - started
    line.take(output.sampled[0])
    seconds = expected.step_seconds([Span(0, 40, 1)])
    assert took >= seconds
    for layer, at in enumerate(layers):
        assert at >= seconds * (layer + 1) / (len(layers) + 1), "no layer is there before its time"
    slow.decode([line], 1)
    assert time.monotonic() - started >= seconds + expected.decode_seconds(1, 40)
    fast = tiny()
    fast.prefill(alike)
    fast.decode([alike], 1)
    assert line.generated == alike.generated, "only the time is another's"


def test_without_a_shape_it_is_the_models_own(tiny_folder):
    info = desk(tiny_folder, model_shape=None).backend.info
    assert info.emulates == "NVIDIA Jetson AGX Orin 64 GB"


def test_a_real_models_pool_is_bound_by_the_emulated_memory_too(tiny_folder):
    with pytest.raises(BackendMisconfigured, match=r"pool_tokens.*room for"):
        desk(tiny_folder, pool_tokens=200_000)
