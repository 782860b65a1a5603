"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Passes text on until a stop string appears, and never a part of one.

    Args:
        stops: the strings that end the text.
        include: leave the stop string at the end of the text.

    Attributes:
        stopped: the stop string that ended the text; None while there is none.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.stopped: str | None = None

    def push(self, text: str, *, watch: bool = True) -> str:
        """The text that is certain now: all but an end that may become a stop string.

        Args:
            text: the next piece.
            watch: False passes everything on and looks for nothing.
        """
        text = self._held + text
        self._held = ""
        if not watch:
            return text
        found = [(start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            # The earliest; of those that begin together the shortest, which was complete first.
            start, self.stopped = min(found, key=lambda place: (place[0], len(place[1])))
            return text[: start + len(self.stopped) if self._include else start]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, when the text ends otherwise."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop`` without completing it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
