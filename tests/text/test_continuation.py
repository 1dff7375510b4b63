"""Tokens to text: whatever the tokens, the parts add up to the whole, and stops hold."""

from hypothesis import example, given
from hypothesis import strategies as st

from gateway.cli.model import find_model
from gateway.text import Continuation, StopStrings, load_text

VOCABULARY = load_text(find_model("bundled"))
TOKENS = st.lists(st.integers(0, VOCABULARY.size - 1), max_size=40)
LETTERS = st.text("ab", min_size=1, max_size=5)


def continuation(*stops: str, include: bool = False, min_tokens: int = 0) -> Continuation:
    return Continuation(
        VOCABULARY.detokenizer(skip_special_tokens=True),
        stops=StopStrings(stops, include=include) if stops else None,
        include_stop=include,
        min_tokens=min_tokens,
    )


@given(tokens=TOKENS, skip=st.booleans())
def test_the_parts_add_up_to_the_whole(tokens: list[int], skip: bool):
    detokenizer = VOCABULARY.detokenizer(skip_special_tokens=skip)
    text = "".join(map(detokenizer.push, tokens)) + detokenizer.flush()
    assert text == VOCABULARY.decode(tokens, skip_special_tokens=skip)


@given(text=st.text(max_size=30))
def test_no_part_ever_ends_inside_a_character(text: str):
    detokenizer = VOCABULARY.detokenizer(skip_special_tokens=False)
    tokens = VOCABULARY.encode(text, add_special_tokens=False)
    parts = [detokenizer.push(token) for token in tokens]
    whole = VOCABULARY.decode(tokens)  # the vocabulary lacks the bytes of some rare characters
    if "\ufffd" not in whole:
        assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) + detokenizer.flush() == whole


def test_bytes_left_at_the_end_become_a_replacement_character():
    emoji = VOCABULARY.encode("🙃", add_special_tokens=False)
    assert len(emoji) > 1
    one = continuation()
    assert one.push(emoji[0], None) == ""
    assert one.push(emoji[0], "length") == "\ufffd\ufffd"
    assert one.finish == "length"


def test_a_token_that_the_vocabulary_lacks_is_no_text():
    assert continuation().push(VOCABULARY.size + 7, None) == ""


def earliest(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Slowly, by the definition: complete first wins, then the longest."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            longest = max(hits, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    parts=st.lists(st.text("ab", max_size=4), max_size=12),
    stops=st.lists(LETTERS, min_size=1, max_size=4),
    include=st.booleans(),
)
@example(parts=["aab"], stops=["ab", "b"], include=False)
def test_stop_strings_are_found_however_the_text_is_cut(
    parts: list[str], stops: list[str], include: bool
):
    search = StopStrings(stops, include=include).search()
    text = "".join(parts)
    expected, hit = earliest(text, stops)
    shown = ""
    for part in parts:
        shown += search.push(part)
        assert (expected + (hit or "")).startswith(shown)
        if search.found:
            break
    else:
        shown += search.flush()
    assert search.found == (hit is not None)
    assert shown == expected + (hit or "" if include else "")


@given(parts=st.lists(st.text("abc", min_size=1, max_size=3), max_size=12), stop=LETTERS)
def test_no_more_is_held_back_than_could_begin_a_stop_string(parts: list[str], stop: str):
    search = StopStrings([stop]).search()
    seen = shown = ""
    for part in parts:
        seen += part
        shown += search.push(part)
        if search.found:
            return
        beginnings = [size for size in range(len(stop)) if seen.endswith(stop[:size])]
        assert len(seen) - len(shown) == max(beginnings)


def test_a_stop_string_across_tokens_ends_the_sequence():
    tokens = VOCABULARY.encode("one two three four", add_special_tokens=False)
    one = continuation("wo thr")
    text = ""
    for token in tokens:
        text += one.push(token, None)
        if one.finish:
            break
    assert (text, one.finish, one.stopped, one.count) == ("one t", "stop", True, 3)


def test_held_back_text_is_shown_when_the_sequence_ends_otherwise():
    one = continuation("two!")
    tokens = VOCABULARY.encode("one two", add_special_tokens=False)
    assert one.push(tokens[0], None) == "one"
    assert one.push(tokens[1], "length") == " two"
    assert not one.stopped


def test_the_token_that_ends_a_sequence_is_counted_and_not_shown():
    (token,) = VOCABULARY.encode("one", add_special_tokens=False)
    hiding, showing = continuation(), continuation(include=True)
    assert (hiding.push(token, "stop"), hiding.count) == ("", 1)
    assert showing.push(token, "stop") == "one"


def test_stop_strings_are_not_looked_for_before_min_tokens():
    tokens = VOCABULARY.encode("a a a a", add_special_tokens=False)
    one = continuation(" a", min_tokens=3)
    text = ""
    for token in tokens:
        text += one.push(token, None)
        if one.finish:
            break
    assert (text, one.count) == ("a a", 3)
