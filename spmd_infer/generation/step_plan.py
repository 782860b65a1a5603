"""What one step computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from spmd_infer.generation.sequences import Sequence


class PrefillChunk(NamedTuple):
    """Prompt tokens to compute: positions ``start`` to ``start + length``.

    A chunk ends at the end of a page or of the prompt, and starts at a page's start except in a fork.

    Attributes:
        sequence: whose they are; ``sequence.tokens[start : start + length]``.
        start: the first position.
        length: tokens, at least one.
        last: whether the prompt ends here: then its last logits are sampled from.
    """

    sequence: Sequence
    start: int
    length: int
    last: bool


@dataclass
class StepPlan:
    """One step: first all copies at once, then prefills and decodes in any order, since none reads what another writes.

    Attributes:
        prefills: chunks, in the order of their ranks.
        decodes: sequences that take a decode step, by part and there by rank. ``computed`` counts the step already.
        copies: pages to copy before anything else, ``(part, source, destination)``; all sources are read before any
            destination is written.
        preempted: sequences that have lost slot and pages, and will queue again.
        expired: sequences whose deadline passed before they ran; the scheduler has forgotten them.
        rejected: sequences too long for a pool that has become smaller; forgotten too.
    """

    prefills: list[PrefillChunk] = field(default_factory=list)
    decodes: list[Sequence] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    expired: list[Sequence] = field(default_factory=list)
    rejected: list[Sequence] = field(default_factory=list)
