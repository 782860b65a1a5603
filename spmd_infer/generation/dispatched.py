"""What dispatched steps chose, on its way from the devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from spmd_infer.generation.prompt_scores import PromptScores
from spmd_infer.generation.requests import Request, Scores
from spmd_infer.generation.speculation import Pace
from spmd_infer.generation.steps import Chosen
from spmd_infer.transfer import fetch, wait

Taking = tuple[tuple[Request, int, int], ...]
"""Requests that take tokens from a step, each with its part and row."""


class Brought(NamedTuple):
    """What a step brings to a request.

    Attributes:
        request: whose it is.
        tokens: one, or more where drafts were right.
        scores: of the one token, where the request asked for them.
        drafted: drafts that were tried.
    """

    request: Request
    tokens: list[int]
    scores: Scores | None = None
    drafted: int = 0


@dataclass(frozen=True)
class Dispatched:
    """A step that chooses one token for each request.

    Attributes:
        name: what it ran.
        chosen: for every row.
        rows: the requests that take a token from it.
        since: when its dispatch began, on ``time.perf_counter``.
    """

    name: str
    chosen: Chosen
    rows: Taking
    since: float = 0.0

    def __post_init__(self) -> None:
        _send(self.chosen if self._scored else self.chosen.tokens)

    def wait(self) -> None:
        """Until the devices have done it."""
        wait(self.chosen)

    @property
    def _scored(self) -> bool:
        return self.chosen.logprobs is not None and any(request.params.scores for request, _, _ in self.rows)

    def read(self) -> list[Brought]:
        """The tokens, each with its scores where its request asked for them."""
        tokens = fetch(self.chosen.tokens)
        host = fetch(self.chosen) if self._scored else None
        found = []
        for request, part, row in self.rows:
            scores = None
            if host is not None and request.params.scores:
                most = request.params.logprobs or 0
                top_ids, top_logprobs = host.top_ids[part, row, :most], host.top_logprobs[part, row, :most]
                scores = Scores(float(host.logprobs[part, row]), top_ids, top_logprobs)
            found.append(Brought(request, [int(tokens[part, row])], scores))
        return found


@dataclass(frozen=True)
class DispatchedScores:
    """A chunk whose prompts' tokens are scored.

    Attributes:
        scores: for every position of every row.
        rows: for each request that takes some: its part and row, and where they are: in its text, and in the row.
        name: what it ran.
        since: as for ``Dispatched``.
    """

    scores: PromptScores
    rows: tuple[tuple[Request, int, int, range, int], ...]
    name: str = "score"
    since: float = 0.0

    def __post_init__(self) -> None:
        _send(self.scores)

    def wait(self) -> None:
        """Until the devices have done it."""
        wait(self.scores)

    def read(self) -> list[Brought]:
        """Write the scores down in their requests; brings no tokens."""
        host = fetch(self.scores)
        for request, part, row, positions, first in self.rows:
            there, here = slice(positions.start, positions.stop), slice(first, first + len(positions))
            kept, most = request.prompt_scores, request.params.prompt_logprobs or 0
            kept.logprobs[there] = host.logprobs[part, row, here]
            kept.top_ids[there] = host.top_ids[part, row, here, :most]
            kept.top_logprobs[there] = host.top_logprobs[part, row, here, :most]
        return []


@dataclass(frozen=True)
class DispatchedDrafts:
    """A step that tries drafts.

    Attributes:
        verified: ``[D, b, k + 3]`` int32, as ``verification.verify`` gives it.
        rows: the requests that take tokens from it.
        pace: is told how many drafts were right.
        name: what it ran.
        since: as for ``Dispatched``.
    """

    verified: jax.Array
    rows: Taking
    pace: Pace
    name: str = "verify"
    since: float = 0.0

    def __post_init__(self) -> None:
        _send(self.verified)

    def wait(self) -> None:
        """Until the devices have done it."""
        wait(self.verified)

    def read(self) -> list[Brought]:
        """The tokens."""
        host = fetch(self.verified)
        found = []
        accepted = 0
        for request, part, row in self.rows:
            *tokens, count, drafted = host[part, row].tolist()
            accepted += count - 1
            found.append(Brought(request, tokens[:count], drafted=drafted))
        self.pace.observe(len(self.rows), accepted)
        return found


def _send(tree: Any) -> None:
    """Let arrays come to the host as soon as they exist; shapes that stand for some stay where they are."""
    for array in jax.tree.leaves(tree):
        if isinstance(array, jax.Array):
            array.copy_to_host_async()


DispatchedStep = Dispatched | DispatchedDrafts | DispatchedScores
"""Whatever the loop reads one step late."""
