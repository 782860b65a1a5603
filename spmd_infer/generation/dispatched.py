"""What dispatched steps chose, on its way from the devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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
    """

    name: str
    chosen: Chosen
    rows: Taking

    def wait(self) -> None:
        """Until the devices have done it."""
        wait(self.chosen)

    def read(self) -> list[Brought]:
        """The tokens, each with its scores where its request asked for them."""
        tokens = fetch(self.chosen.tokens)
        scored = self.chosen.logprobs is not None and any(r.params.scores for r, _, _ in self.rows)
        host = fetch(self.chosen) if scored else None
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
    """

    scores: PromptScores
    rows: tuple[tuple[Request, int, int, range, int], ...]
    name: str = "score"

    def wait(self) -> None:
        """Until the devices have done it."""
        jax.block_until_ready(self.scores)

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
    """

    verified: jax.Array
    rows: Taking
    pace: Pace
    name: str = "verify"

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


DispatchedStep = Dispatched | DispatchedDrafts | DispatchedScores
"""Whatever the loop reads one step late."""
