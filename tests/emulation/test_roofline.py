"""Profiles say where their figures are from, and predict what can be worked out by hand."""

from __future__ import annotations

import json
import time

import msgspec
import pytest

from backends.api import Row, Sampling, Sequence
from backends.emulation.profile import Figure, Profile, Shape, load_profile, load_shape, names
from backends.emulation.roofline import Roofline, Span
from backends.emulation.synthetic import SyntheticBackend
from backends.errors import BackendMisconfigured

SHAPE = Shape(
    source="made up", layers=4, hidden=64, heads=4, kv_heads=2, head_dim=16, feed_forward=100,
    vocabulary=1000, context_tokens=4096,
)  # fmt: skip
SIZES = {"llama-3.1-8b": 8.03e9, "llama-3.1-70b": 70.6e9, "smollm2-135m": 134.5e6}
"""Weights as their makers count them."""


def figure(value: float) -> Figure:
    return Figure(value, "made up")


def profile(**changes) -> Profile:
    figures = {
        "memory_bytes": 1e9,
        "memory_bytes_per_second": 1e9,
        "link_bytes_per_second": 1e8,
        "flops_efficiency": 0.5,
        "memory_efficiency": 0.5,
        "link_efficiency": 1.0,
        "memory_usable": 1.0,
        "step_seconds": 0.0,
        "layer_seconds": 0.0,
        "exchange_seconds": 0.0,
        **changes,
    }
    return Profile(
        name="an accelerator",
        flops={"bfloat16": figure(1e12)},
        **{name: figure(value) for name, value in figures.items()},
    )


def roofline(devices=1, **changes) -> Roofline:
    return Roofline(profile(**changes), SHAPE, weights="bfloat16", kv_bytes=2, devices=devices)


@pytest.mark.parametrize("name", names("profiles"))
def test_a_profile_gives_a_source_for_every_figure(name):
    found = load_profile(name)
    figures = [it for it in msgspec.structs.astuple(found) if isinstance(it, Figure)]
    for it in [*figures, *found.flops.values()]:
        assert len(it.source) > 5
    assert found.flops_efficiency.source.startswith("assumed")


@pytest.mark.parametrize("name", names("shapes"))
def test_a_shape_has_the_weights_that_its_makers_count(name):
    counted = SIZES.get(name)
    shape = load_shape(name)
    assert shape.heads % shape.kv_heads == 0
    if counted is not None:
        assert shape.weights == pytest.approx(counted, rel=0.002)


def test_decoding_alone_takes_as_long_as_reading_the_weights_and_the_kv():
    weights = 4 * 64 * (2 * 16 * 6 + 3 * 100) + 64 * 1000
    kv = 501 + 1
    read_bytes = 2 * weights + kv * (2 * 4 * 2 * 16) * 2
    assert roofline().decode_seconds(1, 500) == pytest.approx(read_bytes / 0.5e9)


def test_a_long_prompt_takes_as_long_as_its_arithmetic():
    tokens = 4000
    linear = 2 * tokens * 4 * 64 * (2 * 16 * 6 + 3 * 100)
    attention = 4 * (tokens * (tokens + 1) // 2) * 4 * 16 * 4
    head = 2 * 64 * 1000 / 0.5e9  # its reading, which is longer than its arithmetic
    expected = (linear + attention) / 0.5e12 + head
    assert roofline().prefill_seconds(tokens, tokens) == pytest.approx(expected)


def test_chunks_cost_the_reading_and_the_steps_that_they_add():
    one = roofline(step_seconds=0.1)
    whole, cut = one.prefill_seconds(1000, 1000), one.prefill_seconds(1000, 250)
    assert cut - whole >= 3 * 0.1


def test_a_batch_shares_the_reading_of_the_weights():
    one = roofline()
    assert one.decode_seconds(8, 10) < 2 * one.decode_seconds(1, 10)
    mixed = one.step_seconds([Span(0, 64, 1), *[Span(10, 11, 1)] * 8])
    assert mixed < one.step_seconds([Span(0, 64, 1)]) + one.decode_seconds(8, 10)


def test_more_devices_are_faster_by_what_they_do_not_spend_on_exchanges():
    assert roofline(4).decode_seconds(1, 500) == pytest.approx(
        roofline().decode_seconds(1, 500) / 4
    )
    slow = roofline(4, exchange_seconds=0.01).decode_seconds(1, 500)
    assert slow == pytest.approx(roofline(4).decode_seconds(1, 500) + 4 * 2 * 0.01)


def test_the_link_limits_a_handoff():
    assert roofline().handoff_seconds(1000) == pytest.approx(1000 * 2 * 4 * 2 * 16 * 2 / 1e8)


def test_a_profile_that_does_not_know_the_weights_dtype_is_refused():
    with pytest.raises(BackendMisconfigured, match="bfloat16"):
        Roofline(profile(), SHAPE, weights="int8", kv_bytes=2)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"flops_efficiency": 1.5}, "flops_efficiency"),
        ({"memory_usable": 0.0}, "memory_usable"),
        ({"memory_bytes_per_second": 0.0}, "memory_bytes_per_second"),
    ],
)
def test_a_profile_that_cannot_be_is_refused(change, field):
    with pytest.raises(ValueError, match=field):
        profile(**change)


@pytest.mark.parametrize("option", ["profile", "model_shape"])
def test_a_name_that_is_not_there_lists_those_that_are(option):
    load = {"profile": load_profile, "model_shape": load_shape}[option]
    with pytest.raises(BackendMisconfigured, match=f"{option}.*(h100|llama)"):
        load("abacus")


def test_a_figure_without_a_source_is_refused(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\n[flops]\nint8 = { value = 1e12 }\n')
    with pytest.raises(BackendMisconfigured, match=r"source.*flops"):
        load_profile(str(file))


def test_a_shape_is_read_from_a_models_own_configuration(tmp_path):
    configuration = {
        "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "intermediate_size": 100, "vocab_size": 1000,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    file = tmp_path / "config.json"
    file.write_text(json.dumps(configuration))
    found = load_shape(str(tmp_path))
    assert msgspec.structs.replace(found, source="made up") == SHAPE
    file.write_text(json.dumps({**configuration, "hidden_size": None}))
    with pytest.raises(BackendMisconfigured, match="hidden_size"):
        load_shape(str(file))


# ---- the synthetic backend at an accelerator's pace


def emulated(**options) -> SyntheticBackend:
    wanted = {"profile": "h100", "model_shape": "llama-3.1-8b", "pool_tokens": 512, **options}
    return SyntheticBackend(**wanted)


def test_a_synthetic_model_has_the_shapes_kv_and_the_profiles_pace():
    backend = emulated()
    layout = backend.info.layout
    assert (layout.layers, layout.kv_heads, layout.head_dim) == (32, 8, 128)
    assert backend.info.emulated
    assert backend.info.emulates == "NVIDIA H100 SXM 80 GB, llama-3.1-8b"
    one = Sequence(prompt=[1] * 300, generated=[], sampling=Sampling(), seed=1)
    row = Row(tokens=one.prompt, start=0, blocks=list(range(20)), sequences=(one,))
    expected = Roofline(
        load_profile("h100"), load_shape("llama-3.1-8b"), weights="bfloat16", kv_bytes=2
    ).step_seconds([Span(0, 300, 1)])
    for slower in (1.0, 20.0):
        backend = emulated(slower=slower)
        started = time.monotonic()
        backend.step([row], lambda row, layer: None)
        assert time.monotonic() - started >= expected * slower


def test_a_pool_is_no_larger_than_what_the_accelerator_has_room_for():
    with pytest.raises(BackendMisconfigured, match=r"pool_tokens.*room for 426788"):
        emulated(pool_tokens=500_000)
    with pytest.raises(BackendMisconfigured, match="devices"):
        emulated(model_shape="llama-3.1-405b")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"layers": 3}, "layers"),
        ({"step_seconds": 0.1}, "profile"),
        ({"model_shape": None}, "model_shape"),
        ({"profile": None, "slower": 2.0}, "profile"),
        ({"profile": None, "devices": 2}, "profile"),
        ({"slower": 0.0}, "slower"),
        ({"devices": 0}, "devices"),
        ({"weights": "float64"}, "weights"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(options, named):
    with pytest.raises(BackendMisconfigured, match=named):
        emulated(**options)
