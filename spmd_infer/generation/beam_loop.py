"""Beam search on the generation loop: each step of every beam is a request for one token.

A beam's earlier tokens lie in the prefix cache, all but its last, unfinished page; so a step computes at most a page of
each beam, and beams come and go without anything being copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from spmd_infer.errors import TaskError
from spmd_infer.generation.beams import BeamSearch, Hypothesis
from spmd_infer.generation.loop import GenerationLoop
from spmd_infer.generation.requests import Request
from spmd_infer.generation.sampling_params import MAX_LOGPROBS, SamplingParams


def search(
    loop: GenerationLoop,
    make: Callable[[list[int], SamplingParams], Request],
    prompt: Sequence[int],
    params: SamplingParams,
    ends: Callable[[tuple[int, ...]], bool],
) -> list[Hypothesis]:
    """Continue one prompt by beam search.

    Args:
        loop: runs the steps.
        make: a request from tokens and parameters.
        prompt: its tokens.
        params: with ``num_beams`` above 1.
        ends: whether a continuation has ended with its last token.

    Returns:
        The ``n`` best continuations, best first.

    Raises:
        TaskError: more beams than candidates can be offered for.
    """
    if 2 * params.num_beams > MAX_LOGPROBS:
        raise TaskError(f"num_beams is {params.num_beams}; the most is {MAX_LOGPROBS // 2}")
    beams = BeamSearch(
        params.num_beams,
        params.max_tokens,
        ends,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        min_tokens=params.min_tokens,
    )
    step = SamplingParams(max_tokens=1, logprobs=beams.num_candidates, ignore_eos=True)
    while not beams.is_done:
        requests = [make([*prompt, *tokens], step) for tokens in beams.beams]
        try:
            for request in requests:
                loop.submit([request])
            loop.run(requests)
        except BaseException:
            for request in requests:
                loop.cancel(request)
            raise
        scores, count = [request.scores[0] for request in requests], beams.num_candidates
        beams.step(
            np.stack([each.top_ids[:count] for each in scores]),
            np.stack([each.top_logprobs[:count] for each in scores]),
        )
    return beams.best(params.n)
