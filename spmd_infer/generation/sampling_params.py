"""The parameters of a request: how it is continued, each value checked against its bounds. Imports no JAX."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from spmd_infer.errors import TaskError
from spmd_infer.generation.structured_outputs import StructuredOutputs

MAX_TOKENS = 1 << 20
MAX_SAMPLES = 64
MAX_LOGPROBS = 20
MAX_BEAMS = MAX_LOGPROBS // 2  # each beam offers twice as many candidates as there are beams
MAX_STOPS, MAX_STOP_CHARS = 16, 256
MAX_STOP_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_ALLOWED = 1 << 16
MAX_BAD_WORDS, MAX_BAD_WORD_CHARS = 64, 64
MAX_TEMPERATURE = 100.0
# Below this, logits divided by it leave float32's exact range; such a request takes the likeliest token.
GREEDY_BELOW = 1e-3


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is continued. Names and meanings are those of vLLM and OpenAI, beams as in transformers.

    Attributes:
        max_tokens: most tokens to generate.
        min_tokens: until so many tokens are generated, no end or stop token is chosen and no stop string ends the text.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it before sampling. Below 0.001 it
            counts as 0.
        top_k: sample among the k likeliest tokens (and those as likely as the k-th); 0 or -1 for all.
        top_p: sample among the likeliest tokens that together reach this probability (Holtzman et al. 2020), after
            ``min_p`` and ``top_k``; 1 for all.
        min_p: drop tokens less likely than this part of the likeliest one's probability (Nguyen et al. 2024); 0 drops
            none.
        repetition_penalty: positive logits of tokens in the prompt or the output are divided by it, negative ones
            multiplied (Keskar et al. 2019); 1 changes nothing.
        frequency_penalty: taken off a token's logit once for each time that it is in the output.
        presence_penalty: taken off the logit of each token that is in the output.
        logit_bias: added to the logits of these tokens.
        allowed_token_ids: the only tokens that may be chosen; None for all.
        bad_words: texts that may not be generated: the token that would complete one is never chosen.
        seed: start of the random stream; None draws one.
        n: how many continuations to return.
        best_of: how many to generate, of which the ``n`` likeliest are returned; None for ``n``.
        num_beams: beams of a beam search; 1 for none. Excludes sampling and everything that changes logits.
        length_penalty: a beam's score is its log-probability over its length to this power.
        early_stopping: of a beam search: True ends with the first ``num_beams`` finished beams, False where a better
            one is unlikely, ``"never"`` where it is impossible.
        logprobs: return the log-probability of each chosen token and of so many likeliest ones; None for none. They
            are the model's own, before any of the changes that these parameters ask for.
        prompt_logprobs: the same for the prompt's tokens after the first, with any number of others beside it. Such a
            prompt is computed whole, whatever earlier prompts have left.
        stop: strings that end the text.
        stop_token_ids: tokens that end it, besides the model's own end tokens.
        include_stop_str_in_output: leave the stop string at the end of the text.
        ignore_eos: go on after the model's end tokens.
        skip_special_tokens: leave control tokens out of the text.
        structured_outputs: the shape that the text must have.

    Raises:
        TaskError: a value out of its bounds, or values that exclude each other.
    """

    max_tokens: int = 64
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    seed: int | None = None
    n: int = 1
    best_of: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words"):  # a lone string is taken for one
            given: object = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else _sequence(name, given))
        object.__setattr__(self, "stop_token_ids", _sequence("stop_token_ids", self.stop_token_ids))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", _sequence("allowed_token_ids", self.allowed_token_ids))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        self._check_numbers()
        self._check_tokens()
        self._check_words()
        self._check_together()

    @property
    def greedy(self) -> bool:
        """Whether each token is simply the likeliest."""
        return self.temperature < GREEDY_BELOW

    @property
    def samples(self) -> int:
        """How many continuations are generated by sampling."""
        return self.n if self.best_of is None else self.best_of

    @property
    def needs_rules(self) -> bool:
        """Whether the next token depends on more than logits, temperature and filters, or is to be scored."""
        return bool(self.penalises or self.logit_bias or self.bad_words or self.masks or self.scores)

    @property
    def scores(self) -> bool:
        """Whether log-probabilities of chosen tokens are needed: to return, or to choose among continuations."""
        return self.logprobs is not None or self.samples > self.n or self.num_beams > 1

    @property
    def penalises(self) -> bool:
        """Whether tokens seen before are penalised."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def masks(self) -> bool:
        """Whether a mask says which tokens may be chosen."""
        return self.structured_outputs is not None or self.allowed_token_ids is not None

    def seeded(self) -> SamplingParams:
        """These parameters with a seed drawn where there is none.

        Where several processes run one request, one of them draws and tells the others.
        """
        return self if self.seed is not None else replace(self, seed=secrets.randbits(32))

    def branches(self) -> list[SamplingParams]:
        """The parameters of each continuation that is sampled: seeds follow on the request's own."""
        one = replace(self.seeded(), n=1, best_of=None)
        assert one.seed is not None
        return [replace(one, seed=(one.seed + index) & 0xFFFFFFFF) for index in range(self.samples)]

    def effective(self) -> dict[str, Any]:
        """The values in force, for a result to show: those that work otherwise than they were given are replaced."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values["best_of"] = self.samples
        if self.greedy:  # filters and seeds have no part in it
            values.update(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=None)
        if self.structured_outputs is not None:
            values["structured_outputs"] = {self.structured_outputs.kind: self.structured_outputs.source}
        return values

    def _check_numbers(self) -> None:
        _whole("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        _whole("min_tokens", self.min_tokens, 0, self.max_tokens)
        _number("temperature", self.temperature, 0, MAX_TEMPERATURE)
        _whole("top_k", self.top_k, 0)
        _number("top_p", self.top_p, 0, 1, above=True)
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, 0, 10, above=True)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**63 - 1)
        _whole("n", self.n, 1, MAX_SAMPLES)
        if self.best_of is not None:
            _whole("best_of", self.best_of, self.n, MAX_SAMPLES)
        _whole("num_beams", self.num_beams, 1, MAX_BEAMS)
        _number("length_penalty", self.length_penalty, -10, 10)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _whole(name, value, 0, MAX_LOGPROBS)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise TaskError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise TaskError(f"early_stopping must be True, False or 'never', not {self.early_stopping!r}")

    def _check_tokens(self) -> None:
        _few("stop_token_ids", self.stop_token_ids, MAX_STOP_IDS)
        if self.allowed_token_ids is not None:
            _few("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED, least=1)
        if not isinstance(self.logit_bias, Mapping):
            raise TaskError(f"logit_bias must map token ids to numbers, not {type(self.logit_bias).__name__}")
        _few("logit_bias", self.logit_bias, MAX_LOGIT_BIAS)
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token in getattr(self, name) or ():
                _whole(name, token, 0, 2**31 - 1)
        for token, bias in self.logit_bias.items():
            _number(f"logit_bias[{token}]", bias, -100, 100)

    def _check_words(self) -> None:
        for name, most, longest in (
            ("stop", MAX_STOPS, MAX_STOP_CHARS),
            ("bad_words", MAX_BAD_WORDS, MAX_BAD_WORD_CHARS),
        ):
            texts = getattr(self, name)
            _few(name, texts, most)
            for text in texts:
                if not isinstance(text, str) or not text:
                    raise TaskError(f"{name} must be non-empty strings, not {text!r}")
                if len(text) > longest:
                    raise TaskError(f"{name} has a string of {len(text)} characters; the most is {longest}")
        shape: object = self.structured_outputs
        if shape is not None and not isinstance(shape, StructuredOutputs):
            raise TaskError(f"structured_outputs must be StructuredOutputs, not {type(shape).__name__}")

    def _check_together(self) -> None:
        if self.structured_outputs is not None:
            self._exclude("structured_outputs", "allowed_token_ids", "min_tokens", "ignore_eos")
        if self.num_beams > 1:
            self._exclude(
                *("num_beams", "temperature", "structured_outputs", "allowed_token_ids", "bad_words", "logit_bias"),
                *("repetition_penalty", "frequency_penalty", "presence_penalty", "best_of", "prompt_logprobs"),
            )
            if self.n > self.num_beams:
                raise TaskError(
                    f"n is {self.n}, but a beam search of num_beams={self.num_beams} finds no more than that"
                )

    def _exclude(self, name: str, *others: str) -> None:
        """Refuse ``name`` together with any of ``others`` that differs from its default."""
        nothing = {
            each.name: each.default_factory() if callable(each.default_factory) else each.default
            for each in fields(self)
        }
        clashing = [other for other in others if getattr(self, other) != nothing[other]]
        if clashing:
            raise TaskError(f"{name} cannot be combined with {', '.join(clashing)}")


def stop_tokens(params: SamplingParams, eos_ids: Collection[int]) -> frozenset[int]:
    """The tokens that end a request."""
    return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(eos_ids))


def check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    """Refuse token ids that the model does not have.

    Raises:
        TaskError: naming the field, the id and the vocabulary's size.
    """
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        beyond = next((token for token in getattr(params, name) or () if token >= vocab_size), None)
        if beyond is not None:
            raise TaskError(f"{name} has {beyond}; the vocabulary has ids 0 to {vocab_size - 1}")


def _sequence(name: str, given: object) -> tuple[Any, ...]:
    if not isinstance(given, Sequence | set | frozenset) or isinstance(given, str | bytes):
        raise TaskError(f"{name} must be a list, not {given!r}")
    return tuple(given)


def _few(name: str, values: Collection[Any], most: int, least: int = 0) -> None:
    if not least <= len(values) <= most:
        raise TaskError(f"{name} must have {least} to {most} entries, not {len(values)}")


def _number(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not (low < value if above else low <= value) or not value <= high:  # type: ignore[operator]
        bounds = f"above {low:g} and at most {high:g}" if above else f"a number from {low:g} to {high:g}"
        raise TaskError(f"{name} must be {bounds}, not {value!r}")


def _whole(name: str, value: object, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        bounds = f"of {low} or more" if high is None else f"from {low} to {high}"
        raise TaskError(f"{name} must be a whole number {bounds}, not {value!r}")


__all__ = ["SamplingParams", "StructuredOutputs", "check_vocabulary", "stop_tokens"]
