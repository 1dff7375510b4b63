import msgspec
import pytest

from transfer.errors import LayoutMismatch
from transfer.layout import KVLayout, Scales, Shard
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
        ({"planes": 1, "kv_heads": 1}, "planes"),
        ({"rotary": (0, 32)}, "rotary"),
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


BY_HEAD = Scales("layer block kv head token")
SHARED = Scales("layer block kv token")


@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        ({"shard": Shard(0, 1)}, {"shard": Shard(1, 2)}, r"shard: the source has heads 0 to 0"),
        ({"windows": (8,) * 30}, {}, r"windows: of layer 0 the source keeps the last 8 .* all"),
        (
            {"windows": (0,) * 29 + (8,)}, {"windows": (9,) * 30},
            r"windows: of layer 29 .* keeps the last 8 tokens, the target needs 9",
        ),
        (
            {"shard": Shard(0, 2)}, {"dtype": "int8", "scales": SHARED},
            r"scales: one covers all 3 heads of the target, of which 2 are moved",
        ),
        (
            {"dtype": "int8", "scales": SHARED}, {"shard": Shard(0, 2)},
            r"scales: one covers all 3 heads of the source, of which 2 are moved",
        ),
        (
            {"planes": 1, "kv_heads": 1}, {"planes": 1, "kv_heads": 1, "rope": "interleaved"},
            r"rope: .* a latent of which nobody says what is rotary",
        ),
        ({"rotary": (0, 7)}, {"rotary": (0, 7), "rope": "interleaved"}, r"rope: .* odd"),
        ({"kv_heads": 1 << 27}, {"kv_heads": 1 << 27}, r"kv_heads: .* at most"),
        ({"head_dim": 1 << 20}, {"head_dim": 1 << 20}, r"head_dim: .* more than a row"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused_with_its_reason(ours, theirs, reason):
    with pytest.raises(LayoutMismatch, match=f"^{reason}"):
        plan(like_source(**ours), like_source(**theirs))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"dtype": "int8"}, "scales"),
        ({"scales": BY_HEAD}, "scales"),
        ({"dtype": "int8", "scales": Scales("layer block kv head")}, "scales.axes"),
        ({"dtype": "int8", "scales": Scales("layer block token dim")}, "scales.axes"),
        ({"shard": Shard(2, 2)}, "shard"),
        ({"windows": (1, 2)}, "windows"),
        ({"rotary": (32, 32)}, "rotary"),
        ({"rotary": (0, 65)}, "rotary"),
        ({"axes": "layer block token dim"}, "axes"),
        ({"axes": "layer kv block head dim token"}, "axes"),
        ({"axes": "layer kv block head token token dim"}, "axes"),
    ],
)
def test_a_layout_that_contradicts_itself_is_refused(changes, field):
    with pytest.raises(ValueError, match=f"^{field}"):
        like_source(**changes)


def test_a_latent_needs_no_axes_for_planes_and_heads():
    latent = like_source(planes=1, kv_heads=1, head_dim=576, axes="layer block token dim")
    assert latent.token_bytes == 30 * 576 * 4
    named = msgspec.structs.replace(latent, axes="block layer kv token head dim")
    assert plan(latent, named).inner == ("dim",)
    assert plan(latent, named).verbatim


def test_scales_have_their_bytes():
    coded = like_source(dtype="int8", scales=BY_HEAD)
    assert coded.token_bytes == 30 * 2 * 3 * (64 + 4)
    assert like_source(dtype="int8", scales=SHARED).token_bytes == 30 * 2 * (3 * 64 + 4)


def test_a_plan_tells_of_heads_windows_and_scales():
    target = like_source(
        shard=Shard(1, 2), windows=(128,) * 30, dtype="int8", scales=BY_HEAD, block_tokens=32
    )
    assert plan(SOURCE, target).line == (
        "heads 1 to 2 of 3; windows all -> 128; dtype float32 -> int8 (a float32 scale per "
        "layer block kv head token); runs of 4096 bytes"
    )


def test_codes_are_copied_where_their_scales_mean_the_same():
    coded = like_source(dtype="int8", scales=BY_HEAD)
    turned = like_source(
        dtype="int8", scales=Scales("block | token head layer kv"), block_tokens=16
    )
    assert plan(coded, turned).verbatim
    assert not plan(coded, like_source(dtype="int8", scales=SHARED)).verbatim
    half = like_source(dtype="int8", scales=Scales(BY_HEAD.axes, "float16"))
    assert not plan(coded, half).verbatim


def test_a_pair_is_planned_once():
    assert plan(SOURCE, like_source(block_tokens=16)) is plan(SOURCE, like_source(block_tokens=16))
