"""Rules about single tokens, of all slots on the devices and of rows that come; masks that the host fills."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spmd_infer.generation.batches import Layout
from spmd_infer.generation.constraints import fill_masks
from spmd_infer.generation.prompt_chunks import NOBODY, Span, spread
from spmd_infer.generation.requests import Request
from spmd_infer.generation.slots import SlotRules, empty_slots
from spmd_infer.generation.step_programs import StepPrograms
from spmd_infer.generation.token_rules import RuleWidths, TokenRules, rule_arrays
from spmd_infer.generation.token_state import TokenState, token_state


class RuleBook:
    """The rules of every slot. There are none, and no memory for them, until a request has some.

    Args:
        programs: make room for them on the devices.
        parts: parts of the rows.
        slots: sequences that run at a time in each part.
        vocab_size: of the model.

    Attributes:
        rules: of every slot; None as long as no request has had any.
    """

    def __init__(self, programs: StepPrograms, *, parts: int, slots: int, vocab_size: int) -> None:
        self._programs, self._parts, self._slots, self._vocab_size = programs, parts, slots, vocab_size
        self._widths = self._least = RuleWidths(biases=0, bad_words=0)
        self.rules: SlotRules | None = None

    def entering(self, layout: Layout, spans: Sequence[Span]) -> SlotRules:
        """The rules ``[D, b, ...]`` of requests that enter, after making room for them in every slot."""
        params = [*(span.request.params for span in spans), NOBODY]
        words = [*(span.request.bad_words for span in spans), ()]
        need = RuleWidths.fitting(params, words)
        known = (need, self._widths, self._least)
        widths = RuleWidths(max(each.biases for each in known), max(each.bad_words for each in known))
        prompts = [*(span.chunk.sequence.tokens[: span.chunk.sequence.prompt_len] for span in spans), []]
        outputs = [*(span.chunk.sequence.tokens[span.chunk.sequence.prompt_len :] for span in spans), []]
        rules = rule_arrays(params, words, widths)
        seen = token_state(prompts, outputs, self._vocab_size)
        if self.rules is None or widths != self._widths:
            self._grow(SlotRules(TokenRules(**rules), TokenState(**seen)), widths)  # type: ignore[arg-type]  # numpy
        return SlotRules(TokenRules(**spread(layout, rules)), TokenState(**spread(layout, seen)))

    def make_room(self) -> None:
        """Make room for the largest rules, so that programs stay what they are whatever comes."""
        self._least = RuleWidths()
        self.entering(Layout(self._parts, 1, ()), [])

    def masks(self, layout: Layout, requests: Sequence[Request]) -> Any:
        """The tokens ``[D, b, V / 32]`` that may come next; a request whose constraint fails ends with its error.

        Where a shape leaves no choice, its request learns which tokens must follow the one that is chosen now.
        """
        for request in requests:
            request.look_ahead()
        lines = np.empty((len(requests) + 1, -(-self._vocab_size // 32)), np.uint32)
        failures = fill_masks(lines, [*(request.mask_rule for request in requests), None])
        for index, error in failures.items():
            requests[index].fail(error)
        return layout.arrays(lines)

    def _grow(self, shown: SlotRules, widths: RuleWidths) -> None:
        """Room for rules of these widths in every slot; what slots hold already stays."""
        empty = self._programs.laid_out("rules", lambda _: empty_slots(shown, self._parts, self._slots))
        if self.rules is not None:
            empty = jax.tree.map(_widened, empty, self.rules)
        self.rules, self._widths = empty, widths


def _widened(new: jax.Array, old: jax.Array) -> jax.Array:
    fill = -1 if old.dtype == jnp.int32 else 0
    return jnp.pad(old, [(0, n - o) for n, o in zip(new.shape, old.shape, strict=True)], constant_values=fill)
