"""A request while it is generated: its parameters, its text as it grows, when things happened, and how it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from spmd_infer.errors import TaskError
from spmd_infer.generation.adapters import Adapter
from spmd_infer.generation.constraints import Constraint
from spmd_infer.generation.detokenizer import Detokenizer
from spmd_infer.generation.sampling_params import MAX_LOGPROBS, SamplingParams
from spmd_infer.generation.stopping import StopText
from spmd_infer.generation.token_rules import TokenIds
from spmd_infer.generation.token_state import token_bits

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]
RequestId = str


@dataclass(frozen=True)
class Scores:
    """The log-probability of a token, and the likeliest tokens in its place.

    Attributes:
        logprob: of the token.
        top_ids: ``[N]`` int32, in falling order; N as ``SamplingParams.logprobs`` asks.
        top_logprobs: ``[N]`` float32.
    """

    logprob: float
    top_ids: npt.NDArray[np.int32]
    top_logprobs: npt.NDArray[np.float32]


@dataclass(frozen=True)
class TextScores:
    """The log-probability of each token of a text after the first, and the likeliest tokens in its place.

    Attributes:
        logprobs: ``[T - 1]`` float32.
        top_ids: ``[T - 1, N]`` int32, in falling order; N as ``SamplingParams.prompt_logprobs`` asks.
        top_logprobs: ``[T - 1, N]`` float32.
    """

    logprobs: npt.NDArray[np.float32]
    top_ids: npt.NDArray[np.int32]
    top_logprobs: npt.NDArray[np.float32]


class Request:
    """One continuation of one prompt.

    Args:
        request_id: its name.
        prompt_ids: tokens of the prompt.
        params: how to continue it, with a seed.
        ends: tokens that end it.
        detokenizer: makes text of its tokens.
        vocab_size: of the model.
        bad_words: token sequences that may not come.
        constraint: keeps its text in shape; None where any text will do.
        adapter: changes the model for it; None for the model itself.
        on_text: called with each piece of text as it becomes certain.

    Attributes:
        scored_ids: tokens whose log-probabilities are to be found beside it; none unless ``score`` says so.
        num_scored: tokens of the prompt whose scores are known or on their way.
        prompt_scores: of each token of ``scored_ids`` after the first.
        token_ids: what was generated, the token that ended it included.
        scores: of each token, where the parameters ask for them.
        finish_reason: None while it runs.
        error: what went wrong, where the finish reason is ``"error"``.
        raised: what ``on_text`` raised; it is called no more then.
        stop_reason: the token or string that ended it; None for the model's own end tokens and other reasons.
        submitted: when it was handed in, in seconds.
        started: when its prompt was first run.
        token_times: when each token was read.
        part: which part of the rows it was first run in.
        cached_tokens: tokens of the prompt whose keys and values were taken from an earlier request.
        drafted_tokens: drafts that were tried.
        accepted_tokens: those of them that became tokens.
        ahead: tokens that must follow the one that is being chosen, where its shape leaves no choice.
        jumped_tokens: tokens that were run so, without a step of their own.
    """

    def __init__(
        self,
        request_id: RequestId,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        ends: frozenset[int],
        detokenizer: Detokenizer,
        vocab_size: int,
        bad_words: Sequence[TokenIds] = (),
        constraint: Constraint | None = None,
        adapter: Adapter | None = None,
        on_text: Callable[[str], None] | None = None,
        submitted: float = 0.0,
    ) -> None:
        self.request_id = request_id
        self.prompt_ids = prompt_ids
        self.params = params
        self.bad_words = bad_words
        self.constraint = constraint
        self.adapter = adapter
        self.score(())
        self.token_ids: list[int] = []
        self.scores: list[Scores] = []
        self.finish_reason: FinishReason | None = None
        self.error: TaskError | None = None
        self.raised: BaseException | None = None
        self.stop_reason: int | str | None = None
        self.submitted = submitted
        self.started: float | None = None
        self.token_times: list[float] = []
        self.part = 0
        self.cached_tokens = 0
        self.drafted_tokens = 0
        self.accepted_tokens = 0
        self.ahead: list[int] = []
        self.jumped_tokens = 0
        self._ends = ends
        self._detokenizer = detokenizer
        self._stop = StopText(params.stop, include=params.include_stop_str_in_output)
        self._pieces: list[str] = []
        self._on_text = on_text
        allowed = params.allowed_token_ids
        self._allowed = None if allowed is None else token_bits(allowed, vocab_size)

    def guard_text(self, guard: Callable[[Callable[[str], None]], Callable[[str], None]]) -> None:
        """Have pieces of text told to ``guard(on_text)`` instead of ``on_text``."""
        if self._on_text is not None:
            self._on_text = guard(self._on_text)

    def score(self, ids: Sequence[int]) -> None:
        """Ask for the log-probabilities of its prompt's tokens, before it is submitted.

        Args:
            ids: the prompt, or the prompt and a token after it.
        """
        self.scored_ids, self.num_scored = ids, 0
        most, kept = max(0, len(ids) - 1), self.params.prompt_logprobs or 0
        self.prompt_scores = TextScores(
            np.zeros(most, np.float32), np.zeros((most, kept), np.int32), np.zeros((most, kept), np.float32)
        )

    @property
    def text(self) -> str:
        """What is certain of the text."""
        return "".join(self._pieces)

    def take(self, tokens: Sequence[int], scores: Scores | None, now: float, *, drafted: int = 0) -> bool:
        """Take what one step has brought, up to the token that ends the request; returns whether one did.

        Args:
            tokens: one, or with drafts some more.
            scores: of the one token.
            now: when they were read.
            drafted: drafts that the step tried.
        """
        self.drafted_tokens += drafted
        for index, token in enumerate(tokens, 1):
            self.accepted_tokens += index < len(tokens)  # the last is the model's own
            if self.push(token, scores, now):
                return True
        return False

    def look_ahead(self) -> None:
        """Find out what must follow the token that is chosen next."""
        self.ahead = [] if self.constraint is None else self.constraint.forced_tokens()[1:]

    def jump(self, tokens: Sequence[int], now: float) -> bool:
        """Take tokens that need not be chosen; returns whether the request has ended with one."""
        for token in tokens:
            self.jumped_tokens += 1
            if self.push(token, None, now):
                return True
        return False

    def push(self, token: int, scores: Scores | None, now: float) -> bool:
        """Take the next token; returns whether the request has ended with it."""
        self.token_times.append(now)
        if token < 0:  # nothing was allowed: the shape is complete
            self._end("stop")
            return True
        self.token_ids.append(token)
        if scores is not None:
            self.scores.append(scores)
        count = len(self.token_ids)
        if token in self._ends:  # not chosen before min_tokens
            self.stop_reason = token if token in self.params.stop_token_ids else None
            self._end("stop")
            return True
        if self.constraint is not None and not self._advance(self.constraint, token):
            return True
        text = self._stop.push(self._detokenizer.push(token), watch=count >= self.params.min_tokens)
        if self._stop.stopped is not None:
            self.stop_reason = self._stop.stopped
            self.finish_reason = "stop"
        elif self.constraint is not None and self.constraint.is_finished:
            self.finish_reason = "stop"
            text += self._rest()
        elif count == self.params.max_tokens:
            self.finish_reason = "length"
            text += self._rest()
        self._write(text)
        return self.finish_reason is not None

    def end(self, reason: FinishReason) -> None:
        """End it from outside, unless it has ended."""
        if self.finish_reason is None:
            self._end(reason)

    def fail(self, error: TaskError) -> None:
        """End it because of an error of its own; the others go on."""
        self.error = error
        self.end("error")

    @property
    def num_top(self) -> int:
        """How many of the likeliest tokens its prompt's program finds: a program is compiled for none or the most."""
        return MAX_LOGPROBS if self.params.prompt_logprobs else 0

    @property
    def mask_rule(self) -> Constraint | npt.NDArray[np.uint32] | None:
        """What says which tokens may come next; None where all may."""
        return self.constraint if self.constraint is not None else self._allowed

    def _advance(self, constraint: Constraint, token: int) -> bool:
        try:
            constraint.advance(token)
        except TaskError as error:
            self.fail(error)
            return False
        return True

    def _end(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        self._write(self._rest())

    def _rest(self) -> str:
        return self._stop.push(self._detokenizer.flush()) + self._stop.flush()

    def _write(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            if self._on_text is not None and self.raised is None:
                try:
                    self._on_text(text)
                except BaseException as error:  # the caller's, for the caller: others share this turn
                    self.raised = error
