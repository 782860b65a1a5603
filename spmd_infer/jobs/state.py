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
        apart: units whose rows are to be computed one by one.
        unclear: those of them whose rows could not be tried, so that what they do then counts.
    """

    done: dict[int, DoneAt] = field(default_factory=dict)
    crashes: Counter[int] = field(default_factory=Counter)
    row_crashes: Counter[tuple[int, int]] = field(default_factory=Counter)
    poison: dict[int, dict[int, str]] = field(default_factory=dict)
    apart: set[int] = field(default_factory=set)
    unclear: set[int] = field(default_factory=set)

    def suspects(self) -> list[int]:
        """Units that should be looked at before they are tried again."""
        often = [unit for unit, count in self.crashes.items() if count >= CRASHES]
        return sorted(unit for unit in often if unit not in self.apart and unit not in self.done)

    def banned(self, unit: int) -> dict[int, str]:
        """Rows of a unit that are not to be tried again, with what happened."""
        found = dict(self.poison.get(unit, {}))
        for (of, row), count in self.row_crashes.items():
            if of == unit and count >= CRASHES and unit in self.unclear:
                found.setdefault(row, f"the process ended {count} times while it computed this row alone")
        return found

    def judge(self, judged: Judged) -> None:
        """Take note of what was found out about a unit."""
        self.crashes.pop(judged.unit, None)
        self.poison.setdefault(judged.unit, {}).update(judged.poison or {})
        if judged.apart:
            self.apart.add(judged.unit)
        if judged.poison is None:
            self.unclear.add(judged.unit)


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
                state.judge(record)
            elif isinstance(record, Done):
                assert place is not None
                open_units.discard(record.unit)
                state.done.setdefault(record.unit, place)
        state.crashes.update(open_units)
        state.row_crashes.update(open_rows)
    return state
