"""Which prompts run together: groups of rows that share one prefill and one decode program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spmd_infer.batching import Buckets
from spmd_infer.errors import TaskError
from spmd_infer.generation.cache import cache_bucket
from spmd_infer.generation.sampling import SamplingParams
from spmd_infer.packing import balance

_SMALLEST_PROMPT = 32


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Attributes:
        index: its place among the caller's prompts.
        ids: its tokens.
        params: how to continue it.
    """

    index: int
    ids: Sequence[int]
    params: SamplingParams

    @property
    def positions(self) -> int:
        """Most positions that its row may come to hold."""
        return len(self.ids) + self.params.max_tokens


@dataclass(frozen=True)
class Group:
    """Requests that run as one batch.

    Attributes:
        rows: the batch, in device order; None is an empty row.
        prompt_len: tokens that every row is padded to.
        capacity: positions of the cache.
        imbalance: prompt tokens on the fullest data shard over the mean; 1 is even.
    """

    rows: tuple[Request | None, ...]
    prompt_len: int
    capacity: int
    imbalance: float

    def input_ids(self) -> npt.NDArray[np.int32]:
        """Prompts ``[B, T]``, padded on the right."""
        ids = np.zeros((len(self.rows), self.prompt_len), np.int32)
        for line, row in zip(ids, self.rows, strict=True):
            if row is not None:
                line[: len(row.ids)] = row.ids
        return ids

    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each prompt ``[B]``; 1 for an empty row, which runs along."""
        return np.array([1 if row is None else len(row.ids) for row in self.rows], np.int32)

    def params(self) -> list[SamplingParams]:
        """Parameters of each row."""
        return [SamplingParams() if row is None else row.params for row in self.rows]


def check_requests(requests: Sequence[Request], vocab_size: int, context_len: int) -> None:
    """Refuse what cannot run, before anything does.

    Raises:
        TaskError: naming the prompt's index: it is empty, has a token outside the vocabulary, or does not fit the
            context together with the tokens asked for.
    """
    for request in requests:
        size, index = len(request.ids), request.index
        if size == 0:
            raise TaskError(f"prompt {index} is empty; a decoder needs at least one token to continue")
        outside = next((token for token in request.ids if not 0 <= token < vocab_size), None)
        if outside is not None:
            raise TaskError(f"prompt {index} has token id {outside}; the vocabulary has ids 0 to {vocab_size - 1}")
        beyond = next((token for token in request.params.stop_token_ids if token >= vocab_size), None)
        if beyond is not None:
            raise TaskError(f"stop_token_ids has {beyond}; the vocabulary has ids 0 to {vocab_size - 1}")
        if size >= context_len:
            raise TaskError(f"prompt {index} has {size} tokens, but the model's context is {context_len}; shorten it")
        if request.positions > context_len:
            raise TaskError(
                f"prompt {index} has {size} tokens and max_tokens asks for {request.params.max_tokens} more, but the "
                f"model's context is {context_len}; use max_tokens of at most {context_len - size}"
            )


def make_groups(
    requests: Sequence[Request], *, parts: int, context_len: int, most_rows: int, most_positions: int
) -> list[Group]:
    """Sort requests by length and cut them into groups.

    Args:
        requests: checked requests.
        parts: data shards.
        context_len: the model's context.
        most_rows: rows of the largest group.
        most_positions: cache positions, over all rows, of the largest group; a group of the smallest bucket is always
            allowed.
    """
    waiting = sorted(requests, key=lambda request: (-request.positions, request.index))
    groups = []
    while waiting:
        capacity = cache_bucket(waiting[0].positions, context_len)
        sizes = Buckets.default(parts, most_rows).sizes
        fitting = [size for size in sizes if size * capacity <= most_positions] or [sizes[0]]
        bucket = next((size for size in fitting if size >= len(waiting)), fitting[-1])
        taken, waiting = waiting[:bucket], waiting[bucket:]
        groups.append(_group(taken, bucket, parts, capacity, context_len))
    return groups


def _group(taken: list[Request], bucket: int, parts: int, capacity: int, context_len: int) -> Group:
    longest = max(len(request.ids) for request in taken)
    prompt_len = _SMALLEST_PROMPT
    while prompt_len < longest:
        prompt_len *= 2
    rows, imbalance = _spread(taken, bucket, parts)
    return Group(rows, min(prompt_len, capacity), capacity, imbalance)


def _spread(taken: list[Request], bucket: int, parts: int) -> tuple[tuple[Request | None, ...], float]:
    """Rows in an order that gives every data shard near-equal prompt tokens."""
    costs = [len(request.ids) for request in taken] + [0] * (bucket - len(taken))
    order, imbalance = balance(costs, parts)
    return tuple(taken[row] if 0 <= row < len(taken) else None for row in order.tolist()), imbalance
