"""How likely a model finds given texts: each token's log-probability, and from them perplexity.

A text is a request whose tokens are scored and whose one new token nobody asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from spmd_infer.errors import TaskError
from spmd_infer.generation.loop import GenerationLoop
from spmd_infer.generation.requests import Request
from spmd_infer.generation.sampling_params import SamplingParams

_AT_ONCE = 8  # texts of each part in the cache at a time

SCORING = SamplingParams(max_tokens=1, prompt_logprobs=0, ignore_eos=True)
"""The parameters of such a request."""


def score_texts(
    loop: GenerationLoop, make: Callable[[int, Sequence[int]], Request], texts: Sequence[Sequence[int]]
) -> list[npt.NDArray[np.float32]]:
    """Log-probability of every token after the first, given those before it.

    Args:
        loop: runs the requests.
        make: a request with ``SCORING`` from a text's index and its tokens: all but the last as the prompt.
        texts: token ids; each text is scored on its own.

    Returns:
        For each text of T tokens, ``[T - 1]`` numbers. Its perplexity is ``exp(-mean)`` of them.

    Raises:
        TaskError: the cache cannot hold a text.
    """
    at_once = _AT_ONCE * len(loop.scheduler.parts)
    # Those of near lengths together: they run in the same programs.
    order = sorted(range(len(texts)), key=lambda index: (-len(texts[index]), index))
    found: dict[int, npt.NDArray[np.float32]] = {}
    for start in range(0, len(order), at_once):
        requests: dict[int, Request] = {}
        try:
            for index in order[start : start + at_once]:
                request = make(index, texts[index])
                loop.submit([request])
                requests[index] = request
            loop.run(requests.values())
        except BaseException:
            for request in requests.values():
                loop.cancel(request)
            raise
        for index, request in requests.items():
            if request.finish_reason != "length":
                raise request.error or TaskError(f"text {index} was {request.finish_reason} before it was scored")
            found[index] = request.prompt_scores.logprobs
    return [found[index] for index in range(len(texts))]


def check_text(index: int, ids: Sequence[int], vocab_size: int, context_len: int) -> None:
    """Refuse what cannot be scored.

    Raises:
        TaskError: a text has fewer than two tokens, one outside the vocabulary, or more than the context holds.
    """
    if len(ids) < 2:
        raise TaskError(f"text {index} has {len(ids)} tokens; scoring needs at least 2, the first is given")
    if len(ids) > context_len:
        raise TaskError(f"text {index} has {len(ids)} tokens, but the model's context is {context_len}; cut it")
    outside = next((token for token in ids if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise TaskError(f"text {index} has token id {outside}; the vocabulary has ids 0 to {vocab_size - 1}")
