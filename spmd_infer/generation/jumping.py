"""Jump-ahead: tokens that a request's shape leaves no choice about are run in one step, not in one each.

A name in a JSON schema, say, is certain before the model has seen it. Its tokens are those that steps of one token
choose, since their masks allow nothing else; so the text is the same, sooner.
"""

from __future__ import annotations

from collections.abc import Mapping

from spmd_infer.generation.requests import Request
from spmd_infer.generation.sequences import Sequence, State


def plan_jumps(
    running: list[Sequence], requests: Mapping[str, Request], most: int, bucket: int, free_tokens: float
) -> None:
    """Say of each sequence how many known tokens its next decode step is to run.

    All rows of a step are as long as the longest, so it must pay for all together: time is taken to be that of reading
    the weights, worth ``free_tokens`` tokens of arithmetic, and of the step's tokens.

    Args:
        running: those with a slot.
        requests: by id.
        most: tokens of one step, at most.
        bucket: rows that the step's program runs.
        free_tokens: tokens whose arithmetic takes as long as reading the weights.
    """
    rows = [sequence for sequence in running if sequence.state is State.DECODE]
    gained = 0
    for sequence in rows:
        request = requests[str(sequence.id)]
        left = sequence.max_tokens - sequence.outputs - len(sequence.flights) - 1
        sequence.ahead = 0 if request.params.scores else max(0, min(len(request.ahead), most, left))
        gained += sequence.ahead
    longer = (free_tokens + bucket * (1 + most)) / (free_tokens + bucket)
    if bucket > free_tokens or len(rows) + gained <= longer * len(rows):
        for sequence in rows:
            sequence.ahead = 0
