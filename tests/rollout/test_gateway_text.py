from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from rollout.gateway.text import OutputText, StopStrings, TextStream


def bytes_decode(token_ids):
    """Every token is one byte: the hardest case for characters of several bytes."""
    return bytes(token_ids).decode("utf-8", "replace")


def cut(sequence, places):
    edges = [0, *sorted(place % (len(sequence) + 1) for place in places), len(sequence)]
    return [sequence[a:b] for a, b in pairwise(edges)]


TEXTS = st.text(alphabet="ab é漢🙂\n", max_size=30)
PLACES = st.lists(st.integers(0, 200), max_size=8)


@given(TEXTS, TEXTS, PLACES)
def test_pieces_are_the_text(prompt, text, places):
    stream = TextStream(bytes_decode, prompt.encode())
    shown = [stream.push(piece) for piece in cut(text.encode(), places) if piece]
    assert not any("\ufffd" in piece for piece in shown), "no half characters"
    assert "".join(shown) + stream.flush() == text


def test_bytes_that_are_no_text_are_shown_in_the_end():
    stream = TextStream(bytes_decode)
    assert stream.push([0xE6]) == "" and stream.push([0xBC]) == ""
    assert stream.flush() == "\ufffd"
    stuck = TextStream(bytes_decode)
    shown = "".join(stuck.push([0x80]) for _ in range(1000))
    assert len(shown) > 800, "what never becomes text is not kept for ever"


def reference(text, stops):
    """Where the first stop string ends the text; of those that begin together the longest."""
    found = [(text.find(stop), -len(stop), stop) for stop in stops if stop in text]
    return (text[: min(found)[0]], min(found)[2]) if found else (text, None)


@given(
    st.text(alphabet="abc", max_size=25), st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3), PLACES
)
def test_nothing_of_a_stop_string_is_shown(text, stops, places):
    found = StopStrings(stops)
    shown, stop = "", None
    for piece in cut(text, places):
        some, stop = found.push(piece)
        shown += some
        if stop is not None:
            break
    if stop is None:
        shown += found.flush()
    expected, expected_stop = reference(text, stops)
    # Where two stop strings overlap the one that is complete first wins, as the text comes in pieces.
    earliest = min((text.find(s) + len(s) for s in stops if s in text), default=None)
    if earliest is None:
        assert (shown, stop) == (expected, expected_stop)
    else:
        assert stop is not None and text.startswith(shown + stop)
        assert not any(s in shown for s in stops)


@given(TEXTS, PLACES)
def test_output_counts_its_tokens(text, places):
    tokens = list(text.encode())
    output, shown, num = OutputText(bytes_decode, ["漢🙂"]), "", 0
    pieces = cut(tokens, places)
    for number, piece in enumerate(pieces, 1):
        found = output.push(piece, number == len(pieces))
        shown, num = shown + found.text, num + found.num_tokens
        if found.stop is not None:
            assert found.stop == "漢🙂"
            break
    place = text.find("漢🙂")
    assert shown == (text if place < 0 else text[:place])
    assert num == (len(tokens) if place < 0 else len(text[: place + 2].encode()))
