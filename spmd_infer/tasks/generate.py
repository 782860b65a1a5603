"""Continue prompts with a decoder: ``engine.generate(prompts, SamplingParams(...))``."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from spmd_infer.errors import SpmdInferError, TaskError
from spmd_infer.generation.adapters import Adapter, Adapters, open_together
from spmd_infer.generation.bad_words import bad_word_ids
from spmd_infer.generation.beam_loop import search
from spmd_infer.generation.constraints import ConstraintCompiler
from spmd_infer.generation.generation_options import GenerationOptions
from spmd_infer.generation.loop import GenerationLoop
from spmd_infer.generation.prompt_chunks import MOST_STOPS
from spmd_infer.generation.requests import Request
from spmd_infer.generation.sampling_params import SamplingParams, check_vocabulary, stop_tokens
from spmd_infer.generation.scoring import SCORING, check_text, score_texts
from spmd_infer.generation.speculation import Draft
from spmd_infer.generation.stopping import StopText
from spmd_infer.generation.tokenizer import Tokenizer
from spmd_infer.generation.warm_up import WarmedUp
from spmd_infer.tasks.completions import Completion, completion_of, completion_of_beams, imbalance

if TYPE_CHECKING:
    from spmd_infer.engine import Engine

Message = Mapping[str, Any]
OnText = Callable[[int, str], None]
AdapterNames = str | Sequence[str | None] | None
Prompt = str | Sequence[int] | Sequence[Message]


class Generate:
    """Continues prompts with one engine.

    Args:
        engine: an engine loaded from a checkpoint of a decoder.
        options: how it generates.

    Raises:
        TaskError: the engine's model is not a decoder of the zoo.
    """

    def __init__(self, engine: Engine, options: GenerationOptions | None = None) -> None:
        family = engine.family
        if family is None or family.task != "generate" or engine.reader is None:
            said = "a model of your own" if family is None else f"family {family.name!r}"
            raise TaskError(
                f"generate takes a decoder of the zoo, but the engine holds {said}; use engine.infer for its logits"
            )
        self._engine = engine
        self._config: Any = engine.config
        self.tokenizer = Tokenizer.from_reader(engine.reader)
        self._options = options or GenerationOptions()
        self._adapters = Adapters(engine, self._options.max_adapters, self._options.max_adapter_rank)
        self.loop = self._new_loop()
        self._ids = count()
        self._warm_up_if_asked()

    def warm_up(
        self, max_rows: int | None = None, max_len: int | None = None, *, rules: bool = True, quiet: bool = False
    ) -> WarmedUp:
        """Compile all programs ahead; see ``GenerationLoop.warm_up``. In a job of several processes all call it."""
        return self.loop.warm_up(max_rows, max_len, rules=rules, quiet=quiet)

    def warm_up_for(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat: bool = False,
        adapter: AdapterNames = None,
        quiet: bool = False,
    ) -> WarmedUp:
        """Compile all programs that a call with these arguments may need; see ``GenerationLoop.warm_up``.

        Raises:
            TaskError: as the call does.
        """
        checked = self._checked(prompts, params, adapter, chat=chat)
        return self.warm_up(
            sum(own.samples * own.num_beams for _, own, _ in checked),
            max(len(ids) + own.max_tokens for ids, own, _ in checked),
            rules=any(own.needs_rules or own.num_beams > 1 or own.samples > own.n for _, own, _ in checked),
            quiet=quiet,
        )

    def __call__(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat: bool = False,
        adapter: AdapterNames = None,
        on_text: OnText | None = None,
    ) -> list[Completion]:
        """Continue prompts.

        Args:
            prompts: one text or several; token ids of one prompt or of several; or the messages of one conversation or
                of several, each a mapping with ``role`` and ``content``.
            params: how to continue them, for all or for each; greedy by default.
            chat: take each text as a user's message.
            adapter: the name of a loaded adapter, for all prompts or for each; None for the model itself.
            on_text: called with a prompt's index and the next piece of its text, as soon as the piece is certain. The
                pieces of one prompt come in order and add up to its text; those of several prompts mix. Of several
                continuations of one prompt, the first is told.

        Returns:
            One completion for each prompt, in order.

        Raises:
            TaskError: a prompt is empty, does not fit the model's context, or is of no known kind; there are not as
                many parameters or adapters as prompts; or an adapter is not loaded. Nothing has been generated then.
        """
        compiling = self._engine.compile_seconds
        checked = self._checked(prompts, params, adapter, chat=chat)
        groups = [
            self._requests(ids, own, None if on_text is None else _telling(on_text, index), changed)
            for index, (ids, own, changed) in enumerate(checked)
            if own.num_beams == 1
        ]
        submitted: list[Request] = []
        try:
            for group in groups:
                self.loop.submit(group)
                submitted += group
            self.loop.run(submitted)
        except BaseException:
            for request in submitted:
                self.loop.cancel(request)
            raise
        searched = [self._search(ids, own, changed) if own.num_beams > 1 else None for ids, own, changed in checked]
        compiled = self._engine.compile_seconds - compiling
        uneven, sampled = imbalance(submitted, self._engine.data_parts), iter(groups)
        return [
            found or completion_of(next(sampled), own, compiled, uneven, self.tokenizer.text_of)
            for found, (_, own, _) in zip(searched, checked, strict=True)
        ]

    def check(self, prompt: Prompt, params: SamplingParams | None = None) -> None:
        """Refuse a prompt that cannot be continued, without continuing it.

        Raises:
            TaskError: as when called.
        """
        self._checked([prompt], params, None, chat=False)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        chat: bool = False,
        adapter: str | None = None,
    ) -> Iterator[str]:
        """Continue one prompt, piece by piece. Closing the iterator cancels the request.

        Args:
            prompt: a text, token ids, or the messages of a conversation.
            params: how to continue it.
            chat: take a text as a user's message.
            adapter: as when called.

        Yields:
            Pieces of the text as soon as they are certain.

        Raises:
            TaskError: as when called.
        """
        pieces, request = self._started(prompt, params, adapter, chat=chat)
        return self._pieces(pieces, request)

    def astream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        chat: bool = False,
        adapter: str | None = None,
    ) -> AsyncIterator[str]:
        """As ``stream``, for ``async for``: the event loop runs on while the devices work."""
        pieces, request = self._started(prompt, params, adapter, chat=chat)
        return self._async_pieces(pieces, request)

    def mesh_changed(self) -> None:
        """Start with an empty cache on the engine's new mesh; what was running has ended as cancelled.

        A draft model moves to the same devices.

        Raises:
            TaskError: it cannot; generation goes on without it.
        """
        self.loop.close()
        self._adapters.mesh_changed()
        speculation = self._options.speculation
        try:
            if isinstance(speculation, Draft) and speculation.engine is not self._engine:
                speculation.engine.reshard(self._engine.mesh)
            self.loop = self._new_loop()
        except SpmdInferError as error:
            if speculation is None:
                raise
            self._options = replace(self._options, speculation=None)
            self.loop = self._new_loop()
            self._warm_up_if_asked()
            raise TaskError(
                f"the draft model cannot follow to {self._engine.plan.mesh}: {error}; generation goes on without drafts"
            ) from error
        self._warm_up_if_asked()

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Load a LoRA adapter, while requests run; see ``Engine.load_adapter``."""
        lora = open_together(self._engine, Path(path))
        with self.loop.lock:
            first = not self._adapters.any_loaded
            self._adapters.load(name, lora)
            if first:
                self._warm_up_if_asked()

    def drop_adapter(self, name: str) -> None:
        """Drop a LoRA adapter; see ``Engine.drop_adapter``."""
        with self.loop.lock:
            self._adapters.drop(name)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that requests may use."""
        return self._adapters.names

    def _warm_up_if_asked(self) -> None:
        if self._options.warm_up:
            self.warm_up()

    def _new_loop(self) -> GenerationLoop:
        kind: type[GenerationLoop] = GenerationLoop
        if self._engine.mesh.is_multi_process:
            from spmd_infer.multihost.replicated_loop import ReplicatedLoop

            kind = ReplicatedLoop
        return kind(self._engine, self._config, self.tokenizer.eos_ids, self._options, self._adapters)

    def _started(
        self, prompt: Prompt, params: SamplingParams | None, adapter: str | None, *, chat: bool
    ) -> tuple[deque[str], Request]:
        ((ids, each, changed),) = self._checked([prompt], params, adapter, chat=chat)
        if each.samples > 1 or each.num_beams > 1:
            raise TaskError("a stream is of one continuation; n, best_of and num_beams must be 1")
        pieces: deque[str] = deque()
        (request,) = self._requests(ids, each, pieces.append, changed)
        self.loop.submit([request])
        return pieces, request

    def _pieces(self, pieces: deque[str], request: Request) -> Iterator[str]:
        try:
            while request.finish_reason is None:
                self.loop.turn()
                while pieces:
                    yield pieces.popleft()
            yield from pieces
        finally:
            self.loop.cancel(request)

    async def _async_pieces(self, pieces: deque[str], request: Request) -> AsyncIterator[str]:
        try:
            while request.finish_reason is None:
                await asyncio.to_thread(self.loop.turn)
                while pieces:
                    yield pieces.popleft()
            while pieces:
                yield pieces.popleft()
        finally:
            self.loop.cancel(request)

    def score(
        self, texts: Sequence[str] | Sequence[Sequence[int]], *, adapter: AdapterNames = None
    ) -> list[npt.NDArray[np.float32]]:
        """Log-probability of every token after the first, for texts or token ids.

        A text is encoded as a prompt is. Its perplexity is ``exp(-mean)`` of the result. Keys and values are rounded as
        the options' ``cache_dtype`` rounds them.

        Args:
            texts: one or several.
            adapter: as when called.

        Raises:
            TaskError: a text has fewer than two tokens or more than the model's context, or an adapter is not loaded.
        """
        encoded = [self._encode(text) for text in _each_prompt(texts, chat=False)]
        for index, ids in enumerate(encoded):
            check_text(index, ids, self._config.vocab_size, self._config.context_len)
        changed = self._each_adapter(adapter, len(encoded))

        def make(index: int, ids: Sequence[int]) -> Request:
            (request,) = self._requests(list(ids[:-1]), SCORING, None, changed[index])
            request.score(ids)
            return request

        return score_texts(self.loop, make, encoded)

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if len(prompt) and isinstance(prompt[0], Mapping):
            text = self.tokenizer.chat([message for message in prompt if isinstance(message, Mapping)])
            return self.tokenizer.encode(text, add_special=False)  # the template writes them itself
        return [int(value) for value in prompt if not isinstance(value, Mapping)]

    def _checked(
        self,
        prompts: Any,
        params: SamplingParams | Sequence[SamplingParams] | None,
        adapter: AdapterNames,
        *,
        chat: bool,
    ) -> list[tuple[list[int], SamplingParams, Adapter | None]]:
        """The tokens, parameters and adapter of each prompt, all of which can run."""
        ids = [self._encode(prompt) for prompt in _each_prompt(prompts, chat=chat)]
        each = _each_params(params, len(ids))
        for index, (tokens, own) in enumerate(zip(ids, each, strict=True)):
            check_prompt(index, tokens, own, self._config.vocab_size, self._config.context_len)
        return list(zip(ids, each, self._each_adapter(adapter, len(ids)), strict=True))

    def _each_adapter(self, names: AdapterNames, count: int) -> list[Adapter | None]:
        if names is None or isinstance(names, str):
            names = [names] * count
        if len(names) != count:
            raise TaskError(
                f"there are {count} prompts but {len(names)} adapters; give one for all, or one (None for none) each"
            )
        return [None if name is None else self._adapters.find(name) for name in names]

    def _requests(
        self,
        ids: list[int],
        params: SamplingParams,
        on_text: Callable[[str], None] | None,
        adapter: Adapter | None,
    ) -> list[Request]:
        """The continuations of one prompt."""
        words = bad_word_ids(params.bad_words, self.tokenizer, self._config.vocab_size)
        ends = stop_tokens(params, self.tokenizer.eos_ids)
        if params.min_tokens and len(ends) > MOST_STOPS:
            raise TaskError(
                f"min_tokens with {len(ends)} end and stop tokens; with min_tokens there may be {MOST_STOPS} of them"
            )
        if params.samples > params.n and params.logprobs is None:
            params = replace(params, logprobs=0)  # the likeliest are to be found
        shape = params.structured_outputs
        constraint = None if shape is None else self._constraints.compile(shape)
        number = next(self._ids)
        requests = [
            Request(
                f"{number}.{branch}",
                ids,
                own,
                ends=ends,
                detokenizer=self.tokenizer.stream(skip_special=own.skip_special_tokens, at_start=False),
                vocab_size=self._config.vocab_size,
                bad_words=words,
                constraint=constraint if constraint is None or branch == 0 else constraint.fork(),
                adapter=adapter,
                on_text=on_text if branch == 0 else None,
            )
            for branch, own in enumerate(params.branches())
        ]
        if params.prompt_logprobs is not None:
            requests[0].score(ids)
        return requests

    def _search(self, ids: list[int], params: SamplingParams, adapter: Adapter | None) -> Completion:
        """Continue one prompt by beam search."""
        ends = stop_tokens(params, self.tokenizer.eos_ids)

        def ended(tokens: tuple[int, ...]) -> bool:
            return tokens[-1] in ends or (bool(params.stop) and self._stopped(tokens, params) is not None)

        def make(tokens: list[int], step: SamplingParams) -> Request:
            return self._requests(tokens, step, None, adapter)[0]

        started, compiling = self.loop.clock(), self._engine.compile_seconds
        found = search(self.loop, make, ids, params, ended)
        texts = []
        for hypothesis in found:
            text = self.tokenizer.decode(hypothesis.tokens, skip_special=params.skip_special_tokens)
            stopped = self._stopped(hypothesis.tokens, params)
            texts.append(text if stopped is None else stopped)
        return completion_of_beams(
            list(zip(found, texts, strict=True)),
            len(ids),
            params,
            self.loop.clock() - started,
            self._engine.compile_seconds - compiling,
        )

    def _stopped(self, tokens: Sequence[int], params: SamplingParams) -> str | None:
        """The text up to a stop string in it; None where there is none."""
        stop = StopText(params.stop, include=params.include_stop_str_in_output)
        text = stop.push(self.tokenizer.decode(tokens, skip_special=params.skip_special_tokens))
        return text if stop.stopped is not None else None

    @cached_property
    def _constraints(self) -> ConstraintCompiler:
        return ConstraintCompiler(self.tokenizer, self._config.vocab_size)


def check_prompt(index: int, ids: Sequence[int], params: SamplingParams, vocab_size: int, context_len: int) -> None:
    """Refuse what cannot run, before anything does.

    Raises:
        TaskError: naming the prompt's index: it is empty, has a token outside the vocabulary, or does not fit the
            context together with the tokens asked for.
    """
    size = len(ids)
    if size == 0:
        raise TaskError(f"prompt {index} is empty; a decoder needs at least one token to continue")
    outside = next((token for token in ids if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise TaskError(f"prompt {index} has token id {outside}; the vocabulary has ids 0 to {vocab_size - 1}")
    check_vocabulary(params, vocab_size)
    if size >= context_len:
        raise TaskError(f"prompt {index} has {size} tokens, but the model's context is {context_len}; shorten it")
    if size + params.max_tokens > context_len:
        raise TaskError(
            f"prompt {index} has {size} tokens and max_tokens asks for {params.max_tokens} more, but the "
            f"model's context is {context_len}; use max_tokens of at most {context_len - size}"
        )


def _telling(on_text: OnText, index: int) -> Callable[[str], None]:
    return lambda text: on_text(index, text)


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
