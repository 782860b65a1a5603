"""Stop strings: found wherever the pieces are cut, and never shown in part."""

from hypothesis import given
from hypothesis import strategies as st

from spmd_infer.generation.stopping import StopText

TEXT = st.text(alphabet="ab", max_size=30)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=3)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """Up to where the first stop string to be complete begins."""
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)], True
    return text, False


@given(TEXT, STOPS)
def test_character_by_character(text: str, stops: list[str]) -> None:
    watcher, shown = StopText(stops), ""
    wanted, stopped = expected(text, stops)
    for char in text:
        shown += watcher.push(char)
        assert wanted.startswith(shown)
        if watcher.stopped:
            break
    assert (watcher.stopped in stops) == stopped
    assert shown + ("" if stopped else watcher.flush()) == wanted


@given(st.lists(st.text(alphabet="ab", max_size=6), max_size=8), STOPS)
def test_pieces(pieces: list[str], stops: list[str]) -> None:
    watcher, shown, text = StopText(stops), "", "".join(pieces)
    for piece in pieces:
        shown += watcher.push(piece)
        assert not any(stop in shown for stop in stops)
        if watcher.stopped:
            break
    assert (watcher.stopped in stops) == any(stop in text for stop in stops)
    assert text.startswith(shown)
    if watcher.stopped:
        assert text[len(shown) :].startswith(watcher.stopped)
    else:
        assert shown + watcher.flush() == text


@given(st.lists(st.text(alphabet="ab", max_size=6), max_size=8), STOPS)
def test_included(pieces: list[str], stops: list[str]) -> None:
    without, including = StopText(stops), StopText(stops, include=True)
    shown = [""] * 2
    for piece in pieces:
        shown = [text + watcher.push(piece) for text, watcher in zip(shown, (without, including), strict=True)]
        assert without.stopped == including.stopped
        if without.stopped:
            assert shown[1] == shown[0] + without.stopped
            return
        assert shown[0] == shown[1]


def test_nothing_is_held_without_reason() -> None:
    watcher = StopText(["</s>"])
    assert watcher.push("a < b") == "a < b"
    assert watcher.push(" <") == " "
    assert watcher.push("/") == ""
    assert watcher.push("p>") == "</p>"


def test_unwatched_text_passes() -> None:
    watcher = StopText(["stop"])
    assert watcher.push("stop sto", watch=False) == "stop sto"
    assert watcher.push("p") == "p"
