"""Speculation: which drafts are tried, and when they are worth it.

A step that tries ``k`` drafts runs ``k + 1`` tokens of each row at once, and keeps those of its own choices that follow
drafts which it would have chosen itself. The tokens are those that steps of one token choose, for rows that draw as
well: a token is drawn with noise that depends on the seed and the token's number alone, so a draft is right if it is
the token that the model draws there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spmd_infer.errors import TaskError

if TYPE_CHECKING:
    from spmd_infer.engine import Engine

_LONGEST_REST = 1024
_MOST_HOPED_FOR = 0.75  # of the drafts


@dataclass(frozen=True, kw_only=True)
class PromptLookup:
    """Drafts from the text itself: what followed where it went like this before.

    Attributes:
        k: drafts a step.
        longest: last tokens that are looked for, at most.
        shortest: at least.
        adaptive: stop for a while where too few drafts are right.
    """

    k: int = 4
    longest: int = 3
    shortest: int = 2
    adaptive: bool = True

    def __post_init__(self) -> None:
        _check_drafts(self.k)
        if not 1 <= self.shortest <= self.longest:
            raise TaskError(
                f"prompt lookup needs 1 <= shortest <= longest, got shortest={self.shortest} and longest={self.longest}"
            )


@dataclass(frozen=True, kw_only=True)
class Draft:
    """Drafts from a smaller model with the same tokens.

    Attributes:
        engine: holds it, on the same devices with as many data parts. Where the larger model is moved to another mesh,
            it is moved too.
        k: drafts a step.
        adaptive: stop for a while where too few drafts are right. What is generated meanwhile the smaller model does
            not see.
    """

    engine: Engine
    k: int = 4
    adaptive: bool = True

    def __post_init__(self) -> None:
        _check_drafts(self.k)


Speculation = PromptLookup | Draft


def _check_drafts(k: int) -> None:
    if not 1 <= k <= 16:
        raise TaskError(f"a step tries 1 to 16 drafts, got k={k}")


def tokens_for_free(platform: str) -> float:
    """Tokens whose arithmetic takes as long as reading the weights."""
    return 8.0 if platform == "cpu" else 256.0


class Pace:
    """Says before each step whether to speculate. It depends on counts only, so that all processes say the same.

    A step's time is taken to be that of reading the weights, worth ``free_rows`` tokens of arithmetic, and of its
    tokens. Drafts pay while those accepted outweigh what the step takes longer. If they do not, plain steps follow, 16
    at first and twice as many after each trial that fails. A step so large that three of four drafts would have to be
    right is not worth a trial.

    Args:
        k: drafts a step.
        free_rows: tokens whose arithmetic takes as long as reading the weights.
        draft_cost: what the drafts of a step cost, as part of a plain step.
        adaptive: without it, always speculate.
        window: row steps to look at, at least; the older count half as much with every window.
    """

    def __init__(
        self, k: int, *, free_rows: float, draft_cost: float = 0.0, adaptive: bool = True, window: int = 24
    ) -> None:
        self._k, self._free_rows, self._draft_cost = k, free_rows, draft_cost
        self._adaptive, self._window = adaptive, window
        self._seen = self._accepted = 0.0
        self._resting, self._rest = 0, 16

    def break_even(self, rows: int) -> float:
        """Drafts of a row that must be right in a step of so many rows."""
        plain = self._free_rows + rows
        return self._draft_cost + rows * self._k / plain

    def wants(self, rows: int) -> bool:
        """Whether the next step, of so many rows, is to speculate; counts that step."""
        if not self._adaptive:
            return True
        if self.break_even(rows) > _MOST_HOPED_FOR * self._k:
            return False
        if self._resting:
            self._resting -= 1
            return False
        if self._seen < self._window or self._accepted >= self.break_even(rows) * self._seen:
            return True
        self._seen = self._accepted = 0.0
        self._resting = self._rest - 1
        self._rest = min(2 * self._rest, _LONGEST_REST)
        return False

    def observe(self, rows: int, accepted: int) -> None:
        """Take what a step that speculated has brought: drafts accepted in all its rows."""
        if self._seen >= 2 * self._window:
            self._seen, self._accepted = self._seen / 2, self._accepted / 2
            if self._accepted >= self.break_even(rows) * self._seen:
                self._rest = 16
        self._seen += rows
        self._accepted += accepted
