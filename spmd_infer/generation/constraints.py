"""Structured output: which tokens a request may take next, as bit masks that llguidance computes on the host.

A ``ConstraintCompiler`` belongs to one tokenizer. It compiles a shape once, in a thread and within limits, and hands
out a ``Constraint`` for each request; a shape that is wrong or too large fails that request alone. While the device
runs a step, the host takes the last step's tokens (``advance``) and fills the next masks (``fill_masks``).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import llguidance
import numpy as np
import numpy.typing as npt

from spmd_infer.errors import TaskError
from spmd_infer.generation.structured_outputs import StructuredOutputs
from spmd_infer.generation.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions  # exists in the library's type stubs only

Mask = npt.NDArray[np.uint32]
Failures = dict[int, TaskError]

_ALL = np.uint32(0xFFFFFFFF)
# Layout between JSON's tokens: a space, or a new line and its indentation. Unbounded, a model at temperature 1 may
# write blanks until its tokens run out.
_JSON_LAYOUT: JsonCompileOptions = {"whitespace_pattern": r"[ ]|\n[ \t]{0,32}", "lenient": False}
_COMPACT: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
}


class Constraint:
    """What one request may say next. Not thread-safe; made by ``ConstraintCompiler``."""

    def __init__(self, matcher: llguidance.LLMatcher, ends: frozenset[int], vocab_size: int) -> None:
        self._matcher = matcher
        self._ends = ends
        self._vocab_size = vocab_size
        # Of the tokens taken, those that the matcher never saw: end tokens after a text that nothing can follow.
        self._taken: list[bool] = []

    @property
    def is_accepting(self) -> bool:
        """Whether the text may end here: then end tokens are allowed, among others."""
        return bool(self._matcher.is_accepting())

    @property
    def is_finished(self) -> bool:
        """Whether the text is complete and nothing but an end token may follow; the request can end at once."""
        return bool(self._matcher.is_stopped())

    def fill(self, mask: Mask) -> None:
        """Write the allowed tokens.

        Args:
            mask: ``[ceil(V / 32)]`` uint32, contiguous; a bit for each token, the lowest id lowest.

        Raises:
            TaskError: the mask is of another size, or the grammar has become too complex here.
        """
        if mask.shape != (-(-self._vocab_size // 32),) or mask.dtype != np.uint32 or not mask.flags.c_contiguous:
            raise TaskError(
                f"a mask must be {-(-self._vocab_size // 32)} contiguous uint32 numbers, not {mask.shape} {mask.dtype}"
            )
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._check()

    def advance(self, token: int) -> None:
        """Take the token that was chosen.

        Raises:
            TaskError: the token is not allowed here; the constraint is of no use after that.
        """
        if self.is_finished and token in self._ends:
            self._taken.append(False)
            return
        if self.is_finished or not 0 <= token < self._vocab_size or not self._matcher.consume_token(token):
            raise TaskError(f"structured output: token {token} is not allowed after {len(self._taken)} tokens")
        self._taken.append(True)

    def allowed(self, tokens: Sequence[int]) -> int:
        """How many of these tokens, from the first on, may follow; nothing is taken."""
        if self.is_finished:
            return int(bool(tokens) and tokens[0] in self._ends)
        return int(self._matcher.validate_tokens(list(tokens)))

    def rollback(self, count: int) -> None:
        """Take back the last ``count`` tokens.

        Raises:
            TaskError: there are not so many.
        """
        if not 0 <= count <= len(self._taken):
            raise TaskError(f"cannot take back {count} tokens of {len(self._taken)}")
        kept = len(self._taken) - count
        seen = sum(self._taken[kept:])
        del self._taken[kept:]
        if seen and not self._matcher.rollback(seen):
            self._check()

    def forced_tokens(self) -> list[int]:
        """The only tokens that may follow, where there is no choice; they need no model. Nothing is taken."""
        return [] if self.is_finished else [int(token) for token in self._matcher.compute_ff_tokens()]

    def fork(self) -> Constraint:
        """A constraint in the same state that goes its own way."""
        forked = Constraint(self._matcher.deep_copy(), self._ends, self._vocab_size)
        forked._taken = list(self._taken)
        return forked

    def _check(self) -> None:
        if self._matcher.is_error():
            raise TaskError(f"structured output failed: {_short(self._matcher.get_error())}")


class ConstraintCompiler:
    """Compiles shapes for one tokenizer.

    Args:
        tokenizer: the model's.
        vocab_size: of the logits; tokens beyond the tokenizer's are never allowed.
        cached: shapes that are kept compiled, the least used dropped first.
        threads: compiled at the same time.
        timeout_s: how long a request waits for its shape. llguidance bounds a compilation by its own counts of work;
            the thread goes on until it meets them.

    Raises:
        TaskError: the model has no end token.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, *, cached: int = 64, threads: int = 2, timeout_s: float = 10.0
    ) -> None:
        if not tokenizer.eos_ids:
            raise TaskError("structured outputs need a model with an end token, and this one has none")
        self._vocab_size = vocab_size
        self._ends = tokenizer.eos_ids
        self._cached = cached
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._building = threading.Lock()
        self._compiled: OrderedDict[tuple[str, str, bool], Future[llguidance.LLMatcher]] = OrderedDict()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="constraints")
        self._serialized = tokenizer.serialized
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._limits = llguidance.LLParserLimits(verbose_errors=False)

    def compile(self, shape: StructuredOutputs) -> Constraint:
        """A constraint at the start of a text; waits for the shape to be compiled, unless it already is.

        Raises:
            TaskError: the shape is wrong, not supported, too large, or took too long.
        """
        key = shape.kind, shape.source, shape.compact
        with self._lock:
            future = self._compiled.get(key)
            if future is None:
                future = self._compiled[key] = self._threads.submit(self._compile, *key)
            self._compiled.move_to_end(key)
            while len(self._compiled) > self._cached:
                self._compiled.popitem(last=False)
        try:
            matcher = future.result(self._timeout_s)
        except TimeoutError:
            raise TaskError(
                f"structured_outputs.{shape.kind} was not compiled within {self._timeout_s:g} s; use a simpler one"
            ) from None
        except TaskError:
            with self._lock:
                self._compiled.pop(key, None)
            raise
        with self._lock:
            return Constraint(matcher.deep_copy(), self._ends, self._vocab_size)

    def close(self) -> None:
        """Let the threads go; what is being compiled is finished in vain."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _compile(self, kind: str, source: str, compact: bool) -> llguidance.LLMatcher:
        try:
            if kind == "json":
                grammar = llguidance.LLMatcher.grammar_from_json_schema(
                    source, defaults=_COMPACT if compact else _JSON_LAYOUT
                )
            else:
                grammar = llguidance.grammar_from(kind, source)  # type: ignore[arg-type]  # the other three kinds
            matcher = llguidance.LLMatcher(self._vocabulary(), grammar, log_level=0, limits=self._limits)
            if not matcher.is_error():
                matcher.compute_bitmask()  # finds out what cannot even start
        except Exception as error:  # ValueError for most; the library promises no particular one
            raise TaskError(f"structured_outputs.{kind} cannot be used: {_short(str(error))}") from error
        if matcher.is_error() or (matcher.is_stopped() and not matcher.is_accepting()):
            said = matcher.get_error() or f"no text fits it ({matcher.stop_reason()})"
            raise TaskError(f"structured_outputs.{kind} cannot be used: {_short(said)}")
        return matcher

    def _vocabulary(self) -> llguidance.LLTokenizer:
        # The first of several threads builds it, in about half a second.
        with self._building:
            if self._tokenizer is None:
                self._tokenizer = llguidance.LLTokenizer(
                    self._serialized(), n_vocab=self._vocab_size, eos_token=sorted(self._ends)
                )
            return self._tokenizer


def fill_masks(masks: Mask, rules: Sequence[Constraint | Mask | None]) -> Failures:
    """Fill a batch of masks.

    One row after the other: a row takes 2 to 12 µs, and threads, which llguidance could use, cost more than that.

    Args:
        masks: ``[B, ceil(V / 32)]`` uint32; its rows are overwritten. Fill another one while a step may still read it.
        rules: for each row a constraint, a mask that stays (``token_bits`` of ``allowed_token_ids``), or None for all.

    Returns:
        What went wrong, by row: those requests fail; their masks allow everything.
    """
    failures: Failures = {}
    for row, rule in enumerate(rules):
        if rule is None:
            masks[row] = _ALL
        elif isinstance(rule, Constraint):
            try:
                rule.fill(masks[row])
            except TaskError as error:
                masks[row] = _ALL
                failures[row] = error
        else:
            masks[row] = rule
    return failures


def _short(message: str, most: int = 400) -> str:
    """The library's message on one line, cut where it repeats a whole schema."""
    line = " ".join(message.replace("<non-verbose/>", "").split())
    return line if len(line) <= most else f"{line[:most]}…"


__all__ = ["Constraint", "ConstraintCompiler", "Failures", "Mask", "fill_masks"]
