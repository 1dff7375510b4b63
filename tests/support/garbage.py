"""Bytes that a stranger might send: noise, and messages that are damaged or lie about lengths."""

from collections.abc import Sequence
from typing import TypeVar

from hypothesis import given, settings
from hypothesis import strategies as st

T = TypeVar("T")

DEEP = b"\x91" * 5000
NO_UTF8 = b"\xa4\xff\xfe\xfd\xfc"
LIES = (
    b"\xc6\xff\xff\xff\xff",  # four gigabytes of binary
    b"\xdb\xff\xff\xff\xff",  # of text
    b"\xdd\xff\xff\xff\xff",  # that many elements
    b"\xdf\xff\xff\xff\xff",  # that many keys
    b"\xc9\xff\xff\xff\xff\x01",  # an extension of that size
    b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff",  # a number that no field holds
    b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",  # not a number
    DEEP,
    NO_UTF8,
)


def garbage(messages: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Noise, and `messages` with bytes flipped, cut out, cut off, or replaced by lies."""
    return st.one_of(st.binary(max_size=200), damaged(messages))


@st.composite
def damaged(draw: st.DrawFn, messages: Sequence[bytes]) -> bytes:
    """One of `messages`, damaged in up to four places."""
    data = bytearray(draw(st.sampled_from(messages)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["flip", "remove", "cut", "insert", "replace"])):
            case "flip" if at < len(data):
                data[at] ^= draw(st.integers(1, 255))
            case "remove":
                del data[at : at + draw(st.integers(1, 8))]
            case "cut":
                del data[at:]
            case "insert":
                data[at:at] = draw(st.sampled_from(LIES))
            case "replace":
                data[at : at + 1] = draw(st.sampled_from(LIES))
    return bytes(data)


def examples(strategy: st.SearchStrategy[T], count: int) -> list[T]:
    """As many as `count` of what `strategy` makes up, the same in every run."""
    seen: list[T] = []

    @settings(max_examples=count, derandomize=True, database=None, deadline=None)
    @given(one=strategy)
    def collect(one: T) -> None:
        seen.append(one)

    collect()
    return seen
