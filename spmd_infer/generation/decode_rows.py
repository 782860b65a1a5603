"""The rows of a decode step as programs take them: their pages, and how their next tokens are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spmd_infer.generation.batches import Ints, Layout, page_arrays
from spmd_infer.generation.page_tables import PageTables
from spmd_infer.generation.sampling import sampling_flags
from spmd_infer.generation.sampling_params import SamplingParams
from spmd_infer.generation.steps import Choice, Rows
from spmd_infer.generation.token_rules import rule_flags
from spmd_infer.models.page_view import PageView

MOST_AHEAD = 7
"""Tokens that a decode step runs of a row besides its last one, where they must follow it."""


def decode_rows(
    layout: Layout,
    slots: Ints,
    tables: Sequence[PageTables],
    most_shared: int,
    ahead: Sequence[Sequence[int]] | None = None,
) -> Rows:
    """The rows as the model runs them.

    Args:
        layout: the rows.
        slots: ``[D, b]``.
        tables: of each part.
        most_shared: pages with several owners that there is room for.
        ahead: the tokens of each that must follow its last one and are run as well; None where none has any.
    """
    view = PageView(**vars(page_arrays(layout, slots, tables, most_shared)))
    lines: Any = None if ahead is None else layout.lines(ahead, MOST_AHEAD, fill=-1)
    return Rows(slots=slots, view=view, ahead=lines)  # type: ignore[arg-type]  # numpy


def choice_arrays(layout: Layout, rows: Rows, params: Sequence[SamplingParams], mask: Any) -> Choice:
    """How the next tokens of these rows are chosen: with the rules of each where there is a mask."""
    arrays: dict[str, Any] = {"flags": sampling_flags(params), "ruled": None, "rule_flags": None}
    if mask is not None:
        arrays["ruled"] = layout.ints([each.needs_rules for each in params]) > 0
        arrays["rule_flags"] = rule_flags(params)
    return Choice(slots=rows.slots, mask=mask, ahead=rows.ahead, **arrays)
