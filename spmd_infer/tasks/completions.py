"""What ``generate`` returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from spmd_infer.errors import TaskError
from spmd_infer.generation.beams import Hypothesis, likeliest_first
from spmd_infer.generation.requests import FinishReason, Request, Scores
from spmd_infer.generation.sampling_params import SamplingParams


@dataclass(frozen=True)
class ScoredToken:
    """A token as an echo shows it.

    Attributes:
        id: the token.
        text: its text; bytes that are no whole character are U+FFFD.
        logprob: its log-probability after those before it; None for the first one, and where nobody asked.
        top: the likeliest tokens in its place with their texts and log-probabilities, in falling order.
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """How one prompt was continued.

    Attributes:
        text: what follows the prompt, without the stop string or end token that ended it.
        token_ids: the generated tokens, the one that ended the text included.
        finish_reason: ``"stop"`` at an end token, stop token or stop string; ``"length"`` after ``max_tokens``;
            ``"cancelled"``; ``"deadline"`` where it passed before the prompt was run; ``"error"``.
        stop_reason: the stop token or stop string that ended it; None for the model's own end tokens.
        error: what went wrong with this request alone.
        prompt_tokens: tokens of the prompt.
        cached_tokens: those of them whose keys and values an earlier prompt had left.
        drafted_tokens: drafts that speculation tried.
        accepted_tokens: those of them that became tokens.
        scores: log-probabilities of each token, where ``logprobs`` asked for them.
        echo: the tokens of the prompt and those generated, where ``prompt_logprobs`` asked for them.
        adapter: the adapter that it was continued with; None for the model itself.
        params: the values in force.
        queue_s: seconds from the call until the prompt was run. All times are without compiling.
        ttft_s: seconds from the call to the first token.
        inter_token_s: seconds between one token and the next, for each after the first.
        compile_s: seconds that the whole call spent compiling.
        imbalance: prompt tokens of the call in the fullest part of the rows over the mean of all parts; 1 is even.
        others: further continuations of the same prompt, where ``n`` asked for them.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: int | str | None
    error: TaskError | None
    prompt_tokens: int
    cached_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    scores: tuple[Scores, ...]
    params: SamplingParams
    queue_s: float
    ttft_s: float
    inter_token_s: tuple[float, ...]
    compile_s: float
    imbalance: float
    echo: tuple[ScoredToken, ...] = ()
    adapter: str | None = None
    others: tuple[Completion, ...] = ()

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first, per second; 0 where there is only one."""
        seconds = sum(self.inter_token_s)
        return len(self.inter_token_s) / seconds if seconds > 0 else 0.0

    @property
    def cumulative_logprob(self) -> float:
        """The log-probability of all its tokens, where ``logprobs`` asked for them."""
        return sum(score.logprob for score in self.scores)


def imbalance(requests: Sequence[Request], parts: int) -> float:
    """Prompt tokens in the fullest part of the rows over the mean of all parts."""
    tokens = [0] * parts
    for request in requests:
        tokens[request.part] += len(request.prompt_ids)
    return max(tokens) * parts / max(1, sum(tokens))


def completion_of(
    group: Sequence[Request],
    params: SamplingParams,
    compiled: float,
    uneven: float,
    text_of: Callable[[int], str],
) -> Completion:
    """The best continuation of a prompt, with the others that were asked for behind it.

    Args:
        group: all its continuations; the first one's prompt has been scored where that was asked for.
        params: what was asked for.
        compiled: seconds spent compiling.
        uneven: the call's imbalance.
        text_of: the text of a token.
    """
    prompt = _prompt_echo(group[0], text_of) if params.prompt_logprobs is not None else ()
    ranked = list(group)
    if params.samples > params.n:
        totals = [sum(score.logprob for score in request.scores) for request in group]
        order = likeliest_first(totals, [len(request.token_ids) for request in group])
        ranked = [group[index] for index in order]
    first, *others = [
        replace(_one(request, params, compiled, uneven), echo=(*prompt, *_own_echo(request, text_of)) if prompt else ())
        for request in ranked[: params.n]
    ]
    return replace(first, others=tuple(others))


def _prompt_echo(request: Request, text_of: Callable[[int], str]) -> tuple[ScoredToken, ...]:
    first, *rest = request.prompt_ids
    scores = request.prompt_scores
    scored = [Scores(*each) for each in zip(scores.logprobs, scores.top_ids, scores.top_logprobs, strict=True)]
    return (ScoredToken(first, text_of(first)), *map(_scored_token, rest, scored, [text_of] * len(rest)))


def _own_echo(request: Request, text_of: Callable[[int], str]) -> list[ScoredToken]:
    if request.params.logprobs is None:
        return [ScoredToken(token, text_of(token)) for token in request.token_ids]
    return list(map(_scored_token, request.token_ids, request.scores, [text_of] * len(request.token_ids)))


def _scored_token(token: int, scores: Scores, text_of: Callable[[int], str]) -> ScoredToken:
    top = zip(scores.top_ids.tolist(), scores.top_logprobs.tolist(), strict=True)
    return ScoredToken(token, text_of(token), float(scores.logprob), tuple((id_, text_of(id_), p) for id_, p in top))


def _one(request: Request, params: SamplingParams, compiled: float, uneven: float) -> Completion:
    assert request.finish_reason is not None  # the loop ends with every request
    times = request.token_times or [request.submitted]
    return Completion(
        text=request.text,
        token_ids=tuple(request.token_ids),
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
        error=request.error,
        prompt_tokens=len(request.prompt_ids),
        cached_tokens=request.cached_tokens,
        drafted_tokens=request.drafted_tokens,
        accepted_tokens=request.accepted_tokens,
        scores=tuple(request.scores) if params.logprobs is not None else (),
        params=request.params,
        queue_s=(request.started or times[0]) - request.submitted,
        ttft_s=times[0] - request.submitted,
        inter_token_s=tuple(after - before for before, after in pairwise(times)),
        compile_s=compiled,
        imbalance=uneven,
        adapter=None if request.adapter is None else request.adapter.name,
    )


def completion_of_beams(
    found: Sequence[tuple[Hypothesis, str]], prompt_tokens: int, params: SamplingParams, seconds: float, compiled: float
) -> Completion:
    """The best hypothesis of a beam search, with the others that were asked for behind it.

    Args:
        found: hypotheses with their texts, best first.
        prompt_tokens: tokens of the prompt.
        params: what was asked for.
        seconds: that the search took, without compiling.
        compiled: seconds spent compiling.
    """
    first, *others = [
        Completion(
            text=text,
            token_ids=hypothesis.tokens,
            finish_reason="length" if hypothesis.length_limited else "stop",
            stop_reason=None,
            error=None,
            prompt_tokens=prompt_tokens,
            cached_tokens=0,
            drafted_tokens=0,
            accepted_tokens=0,
            scores=(),
            params=params,
            queue_s=0.0,
            ttft_s=seconds,  # nothing is certain before the end
            inter_token_s=(0.0,) * (len(hypothesis.tokens) - 1),
            compile_s=compiled,
            imbalance=1.0,
        )
        for hypothesis, text in found
    ]
    return replace(first, others=tuple(others))
