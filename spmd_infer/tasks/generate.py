"""Continue prompts with a decoder: ``engine.generate(prompts, SamplingParams(...))``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from spmd_infer.errors import TaskError
from spmd_infer.generation.detokenizer import Detokenizer
from spmd_infer.generation.groups import Group, Request
from spmd_infer.generation.loop import DecodeLoop
from spmd_infer.generation.sampling import SamplingParams, stop_tokens
from spmd_infer.generation.scoring import Scorer
from spmd_infer.generation.stopping import StopText
from spmd_infer.generation.tokenizer import Tokenizer

if TYPE_CHECKING:
    from spmd_infer.engine import Engine

Message = Mapping[str, Any]
OnText = Callable[[int, str], None]


@dataclass(frozen=True)
class Completion:
    """How one prompt was continued.

    Attributes:
        text: what follows the prompt, without the stop string or end token that ended it.
        token_ids: the generated tokens, the one that ended the text included.
        finish_reason: ``"stop"`` at an end token, stop token or stop string; ``"length"`` after ``max_tokens``.
        prompt_tokens: tokens of the prompt.
        ttft_s: seconds from the call to the first token, without compiling.
        decode_tokens_per_s: tokens after the first, per second; 0 where there is only one.
        compile_s: seconds that the whole call spent compiling.
        imbalance: prompt tokens on the fullest data shard of its batch, over the mean.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    ttft_s: float
    decode_tokens_per_s: float
    compile_s: float
    imbalance: float


class _Writer:
    """One request's text as it grows."""

    def __init__(self, params: SamplingParams, ends: frozenset[int], detokenizer: Detokenizer) -> None:
        self._params = params
        self._ends = ends
        self._detokenizer = detokenizer
        self._stop = StopText(params.stop)
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.finish_reason: Literal["stop", "length"] | None = None
        self.first = self.last = 0.0

    def push(self, token: int, now: float) -> str:
        """Take the next token; the text that became certain with it."""
        if not self.token_ids:
            self.first = now
        self.last = now
        self.token_ids.append(token)
        count = len(self.token_ids)
        if token in self._ends:  # not chosen before min_tokens
            self.finish_reason = "stop"
            return self._write(self._stop.push(self._detokenizer.flush()) + self._stop.flush())
        text = self._stop.push(self._detokenizer.push(token), watch=count >= self._params.min_tokens)
        if self._stop.stopped:
            self.finish_reason = "stop"
        elif count == self._params.max_tokens:
            self.finish_reason = "length"
            text += self._stop.push(self._detokenizer.flush()) + self._stop.flush()
        return self._write(text)

    def _write(self, text: str) -> str:
        self.text.append(text)
        return text


class Generate:
    """Continues prompts with one engine.

    Args:
        engine: an engine loaded from a checkpoint of a decoder.

    Raises:
        TaskError: the engine's model is not a decoder of the zoo.
    """

    def __init__(self, engine: Engine) -> None:
        family = engine.family
        if family is None or family.task != "generate" or engine.reader is None:
            said = "a model of your own" if family is None else f"family {family.name!r}"
            raise TaskError(
                f"generate takes a decoder of the zoo, but the engine holds {said}; use engine.infer for its logits"
            )
        self._engine = engine
        self._config: Any = engine.config
        self.tokenizer = Tokenizer.from_reader(engine.reader)
        self._loop = DecodeLoop(engine, self._config, self.tokenizer.eos_ids)

    def __call__(
        self,
        prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Sequence[Message],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat: bool = False,
        on_text: OnText | None = None,
    ) -> list[Completion]:
        """Continue prompts.

        Args:
            prompts: one text or several; token ids of one prompt or of several; or the messages of one conversation or
                of several, each a mapping with ``role`` and ``content``.
            params: how to continue them, for all or for each; greedy by default.
            chat: take each text as a user's message.
            on_text: called with a prompt's index and the next piece of its text, as soon as the piece is certain. The
                pieces of one prompt come in order and add up to its text; those of several prompts mix.

        Returns:
            One completion for each prompt, in order.

        Raises:
            TaskError: a prompt is empty, does not fit the model's context, or is of no known kind; or there are not as
                many parameters as prompts. Nothing has been generated then.
        """
        token_ids = [self._encode(prompt) for prompt in _each_prompt(prompts, chat=chat)]
        each = _each_params(params, len(token_ids))
        requests = [Request(index, ids, p) for index, (ids, p) in enumerate(zip(token_ids, each, strict=True))]
        writers = [
            _Writer(r.params, stop_tokens(r.params, self.tokenizer.eos_ids), self.tokenizer.stream(at_start=False))
            for r in requests
        ]
        compiling, started = self._engine.compile_seconds, self._loop.clock()
        groups: dict[int, Group] = {}

        def accept(request: Request, token: int, group: Group) -> bool:
            writer = writers[request.index]
            groups[request.index] = group
            text = writer.push(token, self._loop.clock())
            if text and on_text is not None:
                on_text(request.index, text)
            return writer.finish_reason is not None

        self._loop.run(requests, accept)
        compiled = self._engine.compile_seconds - compiling
        return [_completion(writers[r.index], r, started, compiled, groups[r.index].imbalance) for r in requests]

    def score(self, texts: Sequence[str] | Sequence[Sequence[int]]) -> list[npt.NDArray[np.float32]]:
        """Log-probability of every token after the first, for texts or token ids.

        A text is encoded as a prompt is. Its perplexity is ``exp(-mean)`` of the result.

        Raises:
            TaskError: a text has fewer than two tokens or more than the model's context.
        """
        return self._scorer([self._encode(text) for text in _each_prompt(texts, chat=False)])

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self._engine, self._config)

    def _encode(self, prompt: str | Sequence[int] | Sequence[Message]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if len(prompt) and isinstance(prompt[0], Mapping):
            text = self.tokenizer.chat([message for message in prompt if isinstance(message, Mapping)])
            return self.tokenizer.encode(text, add_special=False)  # the template writes them itself
        return [int(value) for value in prompt if not isinstance(value, Mapping)]


def _each_prompt(prompts: Any, *, chat: bool) -> list[str | Sequence[int] | Sequence[Message]]:
    """The prompts one by one, whichever way they came."""
    if isinstance(prompts, str):
        prompts = [prompts]
    if not isinstance(prompts, Sequence | np.ndarray):
        raise TaskError(f"prompts must be texts, token ids or messages, not {type(prompts).__name__}")
    if len(prompts) == 0:
        raise TaskError("there are no prompts; give at least one")
    if isinstance(prompts[0], Mapping | int | np.integer):
        prompts = [prompts]  # one conversation, or one prompt's ids
    for index, prompt in enumerate(prompts):
        kinds = {_kind(part) for part in prompt} if isinstance(prompt, Sequence | np.ndarray) else {"other"}
        if not isinstance(prompt, str) and (len(kinds) > 1 or "other" in kinds):
            raise TaskError(
                f"prompt {index} is a {type(prompt).__name__} that is neither a text, nor token ids, nor messages with "
                "role and content"
            )
    if chat:
        return [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
    return list(prompts)


def _kind(part: object) -> str:
    if isinstance(part, Mapping):
        return "message"
    return "id" if isinstance(part, int | np.integer) and not isinstance(part, bool) else "other"


def _each_params(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise TaskError(
            f"there are {count} prompts but {len(params)} sampling parameters; give one for all, or one each"
        )
    return list(params)


def _completion(writer: _Writer, request: Request, started: float, compiled: float, imbalance: float) -> Completion:
    assert writer.finish_reason is not None  # the loop ends with every request
    after_first = len(writer.token_ids) - 1
    seconds = writer.last - writer.first
    return Completion(
        text="".join(writer.text),
        token_ids=tuple(writer.token_ids),
        finish_reason=writer.finish_reason,
        prompt_tokens=len(request.ids),
        ttft_s=writer.first - started,
        decode_tokens_per_s=after_first / seconds if after_first and seconds > 0 else 0.0,
        compile_s=compiled,
        imbalance=imbalance,
    )
