import msgspec
import pytest

from transfer.errors import LayoutMismatch
from transfer.layout import KVLayout
from transfer.plan import plan

SOURCE = KVLayout(
    model="m",
    weights="float32",
    layers=30,
    kv_heads=3,
    head_dim=64,
    dtype="float32",
    block_tokens=32,
    rope="half",
    axes="layer kv block token head dim",
)


def like_source(**changes):
    return msgspec.structs.replace(SOURCE, **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "other"}, "model"),
        ({"layers": 29}, "layers"),
        ({"kv_heads": 4}, "kv_heads"),
        ({"head_dim": 32}, "head_dim"),
        ({"weights": "q4_1"}, "weights"),
        ({"model": "other", "layers": 1, "weights": "q4_1"}, "model"),
        ({"dtype": "float8_e4m3"}, "dtype"),
    ],
)
def test_unlike_layouts_are_refused_with_the_first_reason(changes, reason):
    with pytest.raises(LayoutMismatch, match=f"^{reason}: "):
        plan(SOURCE, like_source(**changes))


def test_unlike_weights_meet_where_the_operator_allows_it_and_it_shows():
    allowed = plan(SOURCE, like_source(weights="q4_1"), allow_unlike_weights=True)
    assert "UNLIKE WEIGHTS float32 -> q4_1" in allowed.line


def test_an_odd_head_has_no_pairs_to_permute():
    source = like_source(head_dim=63)
    with pytest.raises(LayoutMismatch, match=r"^rope: "):
        plan(source, msgspec.structs.replace(source, rope="interleaved"))


def test_a_plan_says_in_one_line_what_changes():
    target = like_source(
        axes="block layer kv head token dim", block_tokens=16, dtype="bfloat16", rope="interleaved"
    )
    assert plan(SOURCE, target).line == (
        "axes layer kv block token head dim -> block layer kv head token dim; block 32 -> 16; "
        "dtype float32 -> bfloat16; rope half to interleaved; runs of 12288 bytes"
    )
    assert plan(SOURCE, SOURCE).line == "copy as it is; runs of 24576 bytes"


@pytest.mark.parametrize(
    ("axes", "rope", "inner"),
    [
        ("block layer kv head token dim", "half", ("dim",)),
        ("block layer kv token head dim", "half", ("head", "dim")),
        ("block layer token kv head dim", "half", ("head", "dim")),
        ("block layer kv token head dim", "interleaved", ("head", "dim")),
    ],
)
def test_rows_span_the_inner_axes_that_are_alike(axes, rope, inner):
    assert plan(SOURCE, like_source(axes=axes, rope=rope)).inner == inner


def test_k_and_v_share_a_row_unless_only_k_is_permuted():
    source = like_source(axes="layer block token kv head dim")
    target = like_source(axes="block layer token kv head dim")
    assert plan(source, target).inner == ("kv", "head", "dim")
    permuted = msgspec.structs.replace(target, rope="interleaved")
    assert plan(source, permuted).inner == ("head", "dim")


def test_a_pair_is_planned_once():
    assert plan(SOURCE, like_source(block_tokens=16)) is plan(SOURCE, like_source(block_tokens=16))
