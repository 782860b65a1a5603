"""Beam search and best-of-n, as decisions on the host: which sequences go on, from which parent, and when to end.

The scheduler forks sequences as ``BeamSearch.step`` says; the likeliest tokens of each come from ``score_tokens``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from spmd_infer.errors import TaskError

TokenIds = tuple[int, ...]


class Beam(NamedTuple):
    """A sequence that goes on.

    Attributes:
        parent: its place among the beams of the step before.
        token: what it has more than its parent.
        logprob: of all its tokens.
    """

    parent: int
    token: int
    logprob: float


@dataclass(frozen=True)
class Hypothesis:
    """A sequence that has ended.

    Attributes:
        tokens: all that were generated, the end token included.
        logprob: of all of them.
        score: ``logprob / len(tokens) ** length_penalty``.
        length_limited: whether ``max_tokens`` ended it.
    """

    tokens: TokenIds
    logprob: float
    score: float
    length_limited: bool


class BeamSearch:
    """The search for one request, as in transformers' ``generate(num_beams=…)``.

    Args:
        num_beams: sequences that run side by side, and hypotheses that are kept.
        max_tokens: most tokens of a hypothesis.
        ends: whether a sequence ends with its last token; or the tokens that end one.
        length_penalty: above 0 favours long hypotheses, below 0 short ones.
        early_stopping: True ends the search once there are ``num_beams`` hypotheses; False once the best running beam,
            as long as it is now, would not join them; ``"never"`` once it could not even at its greatest length.
        min_tokens: until so many tokens, none ends.

    Attributes:
        beams: the tokens of the sequences that run; one, empty, at first.
    """

    def __init__(
        self,
        num_beams: int,
        max_tokens: int,
        ends: Callable[[TokenIds], bool] | Collection[int],
        *,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        min_tokens: int = 0,
    ) -> None:
        self._num_beams = num_beams
        self._max_tokens = max_tokens
        self._ends = ends if callable(ends) else lambda tokens: tokens[-1] in ends
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping
        self._min_tokens = min_tokens
        self._logprobs: list[float] = [0.0]
        self._finished: list[Hypothesis] = []
        self.beams: list[TokenIds] = [()]

    @property
    def is_done(self) -> bool:
        """Whether the search has ended; ``beams`` is empty then."""
        return not self.beams

    @property
    def num_candidates(self) -> int:
        """How many of the likeliest tokens each beam has to offer for an exact search with one end token."""
        return 2 * self._num_beams

    def step(self, ids: npt.NDArray[np.integer], logprobs: npt.NDArray[np.floating]) -> list[Beam]:
        """Choose how the beams go on.

        Args:
            ids: ``[beams, N]``, the likeliest next tokens of each running beam; N of ``num_candidates`` or more, unless
                the vocabulary is smaller.
            logprobs: ``[beams, N]``, theirs.

        Returns:
            The beams that run from now on, best first: at most ``num_beams``; none once the search is done.

        Raises:
            TaskError: there is not a row for each beam, or the search is done.
        """
        if self.is_done or ids.shape != logprobs.shape or len(ids) != len(self.beams):
            raise TaskError(f"a step of {len(self.beams)} beams got tokens {ids.shape} and logprobs {logprobs.shape}")
        length = len(self.beams[0]) + 1
        totals = np.asarray(logprobs, np.float64) + np.array(self._logprobs)[:, None]
        order = np.argsort(-totals, axis=None, kind="stable")
        running: list[Beam] = []
        rank = 0  # among the candidates that are allowed
        for parent, column in zip(*np.unravel_index(order, totals.shape), strict=True):
            beam = Beam(int(parent), int(ids[parent, column]), float(totals[parent, column]))
            tokens = (*self.beams[beam.parent], beam.token)
            ends = self._ends(tokens)
            if not np.isfinite(beam.logprob) or (ends and length < self._min_tokens):
                continue
            if not ends and length < self._max_tokens:
                running.append(beam)
            elif rank < self._num_beams:  # an end that is not among the best candidates is dropped
                self._finish(tokens, beam.logprob, length_limited=not ends)
            rank += 1
            if rank >= self._num_beams and (len(running) == self._num_beams or length == self._max_tokens):
                break
        if self._no_more(running, length):
            running = []
        self.beams = [(*self.beams[beam.parent], beam.token) for beam in running]
        self._logprobs = [beam.logprob for beam in running]
        return running

    def best(self, count: int) -> list[Hypothesis]:
        """The best hypotheses so far, best first."""
        return self._finished[:count]

    def _finish(self, tokens: TokenIds, logprob: float, *, length_limited: bool) -> None:
        score = self._score(logprob, len(tokens))
        self._finished.append(Hypothesis(tokens, logprob, score, length_limited))
        self._finished.sort(key=lambda hypothesis: -hypothesis.score)  # stable: of equals the earlier
        del self._finished[self._num_beams :]

    def _score(self, logprob: float, length: int) -> float:
        score: float = logprob / float(length) ** self._length_penalty
        return score

    def _no_more(self, running: Sequence[Beam], length: int) -> bool:
        if not running or length == self._max_tokens:
            return True
        if len(self._finished) < self._num_beams:
            return False
        if self._early_stopping is True:
            return True
        # A log-probability only falls; with a penalty above 0 it may still gain by length.
        gains = self._early_stopping == "never" and self._length_penalty > 0
        reach = self._score(running[0].logprob, self._max_tokens if gains else length)
        return reach <= self._finished[-1].score


def likeliest_first(logprobs: Sequence[float], lengths: Sequence[int]) -> list[int]:
    """The order of sampled continuations for ``best_of``: by log-probability per token, as OpenAI defines it.

    Args:
        logprobs: the sum over each one's tokens.
        lengths: their numbers of tokens.
    """
    means = [logprob / max(length, 1) for logprob, length in zip(logprobs, lengths, strict=True)]
    return sorted(range(len(means)), key=lambda index: -means[index])


__all__ = ["Beam", "BeamSearch", "Hypothesis", "likeliest_first"]
