"""How far a job has come, from what its ranks wrote down in all runs so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spmd_infer.jobs.log import Begun, Done, DoneAt, Judged, Left, LogReader

CRASHES = 2
"""So often may a process die over something before it is suspected."""


@dataclass
class State:
    """What earlier runs have left.

    Attributes:
        done: finished units, with where their results are; where two runs have finished one, the first.
        crashes: how often a process ended while it computed a unit, since that was last looked at.
        row_crashes: likewise for rows that were computed alone, by unit and row.
        poison: rows that crash the process, by unit, with what happened.
        judged: units that have been looked at.
    """

    done: dict[int, DoneAt] = field(default_factory=dict)
    crashes: Counter[int] = field(default_factory=Counter)
    row_crashes: Counter[tuple[int, int]] = field(default_factory=Counter)
    poison: dict[int, dict[int, str]] = field(default_factory=dict)
    judged: set[int] = field(default_factory=set)

    def suspects(self) -> list[int]:
        """Units that should be looked at before they are tried again."""
        return sorted(
            unit
            for unit, count in self.crashes.items()
            if count >= CRASHES and unit not in self.judged and unit not in self.done
        )

    def apart(self) -> list[int]:
        """Units whose rows crash the process together and not one by one, or that could not be looked at."""
        return sorted(
            unit
            for unit, count in self.crashes.items()
            if count >= CRASHES and unit in self.judged and unit not in self.done
        )

    def banned(self, unit: int) -> dict[int, str]:
        """Rows of a unit that are not to be tried again, with what happened."""
        found = dict(self.poison.get(unit, {}))
        for (of, row), count in self.row_crashes.items():
            if of == unit and count >= CRASHES:
                found.setdefault(row, f"the process ended {count} times while it computed this row alone")
        return found


def read_state(logs: Sequence[Path]) -> State:
    """Read what all runs have written, oldest first; every byte of their results is checked."""
    state = State()
    for path in logs:
        open_units: set[int] = set()
        open_rows: set[tuple[int, int]] = set()
        for record, place in LogReader(path).records():
            if isinstance(record, Begun):
                if record.row is None:
                    open_units.add(record.unit)
                else:
                    open_rows.add((record.unit, record.row))
            elif isinstance(record, Left):
                if record.row is None:
                    open_units.discard(record.unit)
                else:
                    open_rows.discard((record.unit, record.row))
            elif isinstance(record, Judged):
                state.judged.add(record.unit)
                if record.poison is not None:
                    state.crashes.pop(record.unit, None)
                    state.poison.setdefault(record.unit, {}).update(record.poison)
            elif isinstance(record, Done):
                assert place is not None
                open_units.discard(record.unit)
                state.done.setdefault(record.unit, place)
        state.crashes.update(open_units)
        state.row_crashes.update(open_rows)
    return state
