"""Pieces of prompts as the programs run them: from the start of a page, padded to a few lengths, rows side by side."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spmd_infer.generation.batches import Ints, Layout
from spmd_infer.generation.dispatched import DispatchedScores
from spmd_infer.generation.kv_pages import PAGE_SIZE
from spmd_infer.generation.prompt_scores import PromptScores, Targets
from spmd_infer.generation.requests import Request
from spmd_infer.generation.sampling import SamplingArrays, sampling_arrays
from spmd_infer.generation.sampling_params import SamplingParams
from spmd_infer.generation.step_plan import PrefillChunk
from spmd_infer.generation.step_sizes import StepSizes
from spmd_infer.generation.steps import Chunk, Entering

MOST_STOPS = 8
"""End and stop tokens of a request with ``min_tokens``, at most."""

NOBODY = SamplingParams()
"""Parameters of rows that only fill up."""


@dataclass(frozen=True)
class ChunkKind:
    """What chunks that run in one program have in common.

    Attributes:
        length: positions of each.
        earlier: pages before each, at most; 0 where all begin their prompts.
        ruled: whether they have rules about single tokens.
        adapted: whether they have adapters.
        num_top: how many of the likeliest tokens to find beside each of the prompt; None where none is to be scored.
    """

    length: int
    earlier: int
    ruled: bool
    adapted: bool = False
    num_top: int | None = None


@dataclass(frozen=True)
class Span:
    """A chunk as it is run.

    Attributes:
        chunk: as it was planned.
        request: whose it is.
        start: the first position, the start of a page.
        tokens: from there on.
    """

    chunk: PrefillChunk
    request: Request
    start: int
    tokens: Sequence[int]

    @classmethod
    def of(cls, chunk: PrefillChunk, request: Request) -> Span:
        """A planned chunk from the start of its first page."""
        # Only a fork starts within a page; the page is its own by then, and its first positions are computed again.
        start = chunk.start - chunk.start % PAGE_SIZE
        return cls(chunk, request, start, chunk.sequence.tokens[start : chunk.start + chunk.length])

    @property
    def scored(self) -> range | None:
        """The positions whose next tokens are to be scored; None where there are none.

        A request that lost its pages is run again, and not scored again.
        """
        end = min(self.start + len(self.tokens), len(self.request.scored_ids) - 1)
        positions = range(max(self.start, self.request.num_scored), end)
        return positions if positions else None

    def kind(self, sizes: StepSizes) -> ChunkKind:
        """Which programs run it."""
        length, earlier = sizes.chunk(len(self.tokens), self.start // PAGE_SIZE)
        return ChunkKind(
            length,
            earlier,
            ruled=self.request.params.needs_rules,
            adapted=self.request.adapter is not None,
            num_top=None if self.scored is None else self.request.num_top,
        )


def by_kind(spans: Sequence[Span], sizes: StepSizes) -> Iterator[tuple[ChunkKind, list[Span]]]:
    """Those that run together, in batches of at most as many rows as there are programs for."""
    kinds: dict[ChunkKind, list[Span]] = {}
    for span in spans:
        kinds.setdefault(span.kind(sizes), []).append(span)
    for kind, group in kinds.items():
        most = sizes.most_chunk_rows(kind.length, kind.earlier) or len(group)
        own: dict[int, list[Span]] = {}
        for span in group:
            own.setdefault(span.chunk.sequence.part, []).append(span)
        for start in range(0, max(map(len, own.values())), most):
            yield kind, [span for spans in own.values() for span in spans[start : start + most]]


def chunk_arrays(layout: Layout, spans: Sequence[Span], length: int) -> Chunk:
    """Spans of one kind, one for each entry of the layout, as a program of that length runs them."""
    return Chunk(
        input_ids=layout.lines([span.tokens for span in spans], length),  # type: ignore[arg-type]  # numpy, as below
        starts=layout.ints([span.start for span in spans]),  # type: ignore[arg-type]
        counts=layout.ints([len(span.tokens) for span in spans]),  # type: ignore[arg-type]
    )


def target_arrays(layout: Layout, spans: Sequence[Span], kind: ChunkKind) -> Targets:
    """The tokens to score in spans of one kind."""
    lines = []
    for span in spans:
        line = [-1] * kind.length
        positions = span.scored or range(0)
        first = positions.start - span.start
        line[first : first + len(positions)] = span.request.scored_ids[positions.start + 1 : positions.stop + 1]
        lines.append(line)
    assert kind.num_top is not None
    return Targets(layout.lines(lines, kind.length, fill=-1), kind.num_top)  # type: ignore[arg-type]  # numpy


def scored(layout: Layout, spans: Sequence[Span], scores: PromptScores, since: float) -> DispatchedScores:
    """The scores of such a step on their way to the requests, which are told that they need not be found again."""
    rows = []
    for span, (part, row) in zip(spans, layout.places, strict=True):
        if (positions := span.scored) is not None:
            rows.append((span.request, part, row, positions, positions.start - span.start))
            span.request.num_scored = positions.stop
    return DispatchedScores(scores, tuple(rows), since=since)


def entering_arrays(layout: Layout, spans: Sequence[Span], eos_ids: Collection[int], nobody: int) -> Entering:
    """What the slots of the same spans are to know, without rules.

    Args:
        layout: the rows.
        spans: one for each entry of the layout; one whose prompt goes on is entered into no slot.
        eos_ids: the model's end tokens.
        nobody: the slot of rows that only fill up.
    """
    sequences = [span.chunk.sequence for span in spans]
    slots = [sequence.slot if span.chunk.last else nobody for span, sequence in zip(spans, sequences, strict=True)]
    sampling = sampling_arrays([*(span.request.params for span in spans), NOBODY], eos_ids, most_stops=MOST_STOPS)
    return Entering(
        slots=layout.ints([slot or 0 for slot in slots], fill=nobody),  # type: ignore[arg-type]  # numpy, as below
        lengths=layout.ints([span.start + len(span.tokens) for span in spans]),  # type: ignore[arg-type]
        generated=layout.ints([sequence.outputs for sequence in sequences]),  # type: ignore[arg-type]
        sampling=SamplingArrays(**spread(layout, sampling)),
        rules=None,
        mask=None,
    )


def pages_before(layout: Layout, spans: Sequence[Span], earlier: int) -> Ints:
    """The pages before each span, ``[D, b, earlier]``."""
    return layout.lines([span.chunk.sequence.pages[: span.start // PAGE_SIZE] for span in spans], earlier)


def pages_for(layout: Layout, spans: Sequence[Span], length: int, nowhere: int) -> Ints:
    """The pages that each span's keys and values go to, ``[D, b, length / S]``; ``nowhere`` where it has none."""
    count = length // PAGE_SIZE
    own = [span.chunk.sequence.pages[span.start // PAGE_SIZE :][:count] for span in spans]
    return layout.lines(own, count, fill=nowhere)


def spread(layout: Layout, fields: dict[str, npt.NDArray[np.generic]]) -> dict[str, Any]:
    """Arrays of each entry and one more as ``[D, b, ...]``; scalars as they are."""
    return {name: layout.arrays(values) if values.ndim else values for name, values in fields.items()}
